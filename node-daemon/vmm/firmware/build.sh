#!/usr/bin/env bash
# build.sh FOLDER: builds the UEFI firmware, edk2's CloudHv platform, and leaves `bascule-firmware` (an ELF file with a PVH
# note) and its licence in FOLDER. Does nothing when FOLDER has what this script builds. docs/adr/0014 says why this one.
#
# The source is the upstream tarball of Debian 13's package edk2, fetched through the machine's own Debian
# mirror. Its revisions for security have the same tarball: what they patch (network, secure boot, SMM) is not built here.
set -euo pipefail

suite=trixie
source=edk2
version=2025.02
sha256=b63b6053d6d89c74d9291f9e96fde1584be99e6fb9c169ba9511505129d6b049

out=$(realpath -m "$1")
script=$(sha256sum "$0" | cut -d' ' -f1)
if [ "$(cat "$out/built-by" 2>/dev/null)" = "$script" ]; then exit 0; fi

for tool in gcc make nasm iasl python3; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: make packages" >&2; exit 1; }
done
[ -e /usr/include/uuid/uuid.h ] || { echo "uuid-dev is missing: make packages" >&2; exit 1; }

work=$(mktemp -d)
log=$work/log
# The log is long and of interest only when a step fails.
trap 'status=$?; [ $status = 0 ] || [ ! -e "$log" ] || tail -40 "$log" >&2; rm -rf "$work"' EXIT

# The tarball's place on the mirror of the first Debian source of this machine, from a package index of its own.
fetch() {
  local site apt=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
  site=$(apt-get indextargets --format '$(SITE)' 'Label: Debian' | head -1)
  [ -n "$site" ] || { echo "apt-get knows no Debian mirror: run apt-get update" >&2; return 1; }
  mkdir -p "$work"/{lists,cache/archives}/partial
  echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site $suite main" >"$work/sources.list"
  apt-get -qq "${apt[@]}" update
  local uri
  uri=$(apt-get "${apt[@]}" source --print-uris --only-source "$source" 2>/dev/null |
    grep -o "'[^']*/${source}_$version\.orig\.tar\.xz'" | tr -d "'")
  [ -n "$uri" ] || { echo "$suite has no $source $version any more: raise the version in $0" >&2; return 1; }
  /usr/lib/apt/apt-helper -qq "${apt[@]}" download-file "$uri" "$1" "SHA256:$sha256"
}

mkdir -p "$out"
tarball=$out/${source}_$version.orig.tar.xz
if ! echo "$sha256  $tarball" | sha256sum --check --status 2>/dev/null; then
  fetch "$work/tarball"
  echo "$sha256  $work/tarball" | sha256sum --check --status
  mv "$work/tarball" "$tarball"
fi
tar -C "$work" -xf "$tarball"
cd "$work/$source-$version"

# Debian removes the source of this compressor, which no platform here uses.
sed -i '/BrotliCompress/d' BaseTools/Source/C/GNUmakefile
# Compilers that protect the stack by default call a function that firmware does not have.
sed -i 's/^DEFINE GCC48_ALL_CC_FLAGS *=/& -fno-stack-protector/' BaseTools/Conf/tools_def.template

# The platform's list of drivers has this one without the network stack too.
sed -i '/VirtioNet\.inf/d' OvmfPkg/CloudHv/CloudHvX64.fdf

# The exception handlers put back a task priority (CR8) that nothing in firmware changes. QEMU's emulation of AMD-V, on which the
# firmware is tested, aborts at that while KVM waits to inject an interrupt (target/i386: helper_write_crN).
sed -i '/^ *mov *cr8, rax/d' UefiCpuPkg/Library/CpuExceptionHandlerLib/X64/*ExceptionHandlerAsm.nasm

export WORKSPACE=$PWD EDK_TOOLS_PATH=$PWD/BaseTools CONF_PATH=$PWD/Conf PYTHON_COMMAND=python3
export SOURCE_DATE_EPOCH=0 PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1
jobs=$(nproc)
make -s -C BaseTools/Source/C -j "$jobs" >"$log" 2>&1
# edksetup.sh reads this script's arguments, and variables that nobody has set.
set --
set +u
. ./edksetup.sh >>"$log" 2>&1
set -u
# No network stack and no shell: what is not there cannot be attacked, and neither is needed to boot a disk.
build -q -n "$jobs" -a X64 -t GCC5 -b RELEASE -p OvmfPkg/CloudHv/CloudHvX64.dsc \
  -D NETWORK_ENABLE=FALSE -D BUILD_SHELL=FALSE \
  --pcd 'gEfiMdeModulePkgTokenSpaceGuid.PcdFirmwareVendor=LEDK II\0' \
  --pcd "gEfiMdeModulePkgTokenSpaceGuid.PcdFirmwareVersionString=L$version\\0" >>"$log" 2>&1

install -m 644 Build/CloudHvX64/RELEASE_GCC5/FV/CLOUDHV.fd "$out/bascule-firmware"
install -m 644 License.txt "$out/bascule-firmware.copyright"
echo "$script" >"$out/built-by"
sha256sum "$out/bascule-firmware"
