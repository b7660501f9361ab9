//! The rules of the schema, for those who read a document without an API server.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sha2::{Digest, Sha256};

use super::field_error::FieldError;
use super::label::is_label;
use super::source::Source;
use super::spec::{Disk, Interface, VirtualMachineSpec};
use crate::{Duration, Quantity};

impl VirtualMachineSpec {
    /// Checks what the schema's rules check, plus what follows from several fields together.
    ///
    /// # Errors
    /// Every field that is wrong, in document order.
    pub fn check(&self, metadata: &ObjectMeta) -> Result<(), Vec<FieldError>> {
        let mut errors = Errors(vec![]);
        let name = metadata.name.as_deref().unwrap_or_default();
        errors.require(is_label(name), "metadata.name", DNS_LABEL);
        errors.require(
            (1..=64).contains(&self.cpu.cores),
            "spec.cpu.cores",
            "a guest has 1 to 64 processors",
        );
        if let Some(bytes) = errors.quantity(&self.memory, "spec.memory") {
            let sane = (16 * MIB..=4 * TIB).contains(&bytes);
            errors.require(
                sane,
                "spec.memory",
                "a guest has at least 16Mi and at most 4Ti of memory",
            );
            errors.require(
                bytes % (2 * MIB) == 0,
                "spec.memory",
                "memory must be a multiple of 2Mi",
            );
        }
        self.check_boot(&mut errors);
        errors.require(
            !self.volume.is_empty(),
            "spec.volume",
            "name the SharedVolume",
        );
        errors.require(self.disks.len() <= 16, "spec.disks", "at most 16 disks");
        errors.require(
            self.interfaces.len() <= 8,
            "spec.interfaces",
            "at most 8 interfaces",
        );
        for (index, disk) in self.disks.iter().enumerate() {
            errors.disk(disk, &format!("spec.disks[{index}]"));
            let twice = self.disks[..index]
                .iter()
                .any(|other| other.name == disk.name);
            errors.require(
                !twice,
                &format!("spec.disks[{index}].name"),
                "the name is used twice",
            );
        }
        self.check_interfaces(metadata.uid.as_deref(), &mut errors);
        if let Some(cloud_init) = &self.cloud_init {
            cloud_init.check(|holds, field, message| {
                errors.require(holds, &format!("spec.cloudInit.{field}"), message);
            });
        }
        self.check_availability(&mut errors);
        if errors.0.is_empty() {
            Ok(())
        } else {
            Err(errors.0)
        }
    }

    fn check_boot(&self, errors: &mut Errors) {
        let boot = &self.boot;
        errors.require(
            boot.kernel.is_some() != boot.firmware.is_some(),
            "spec.boot",
            "set exactly one of firmware and kernel",
        );
        if let Some(kernel) = &boot.kernel {
            errors.source(kernel, "spec.boot.kernel");
        } else {
            let alone = boot.initrd.is_none() && boot.cmdline.is_empty();
            errors.require(alone, "spec.boot", KERNEL_ONLY);
        }
        if let Some(initrd) = &boot.initrd {
            errors.source(initrd, "spec.boot.initrd");
        }
        errors.require(
            boot.cmdline.len() <= 2047,
            "spec.boot.cmdline",
            "the kernel takes at most 2047 bytes",
        );
        if boot.firmware.is_some() {
            let bytes = self.memory.to_bytes().unwrap_or(u64::MAX);
            errors.require(
                bytes >= FIRMWARE_MEMORY_MIN,
                "spec.memory",
                "firmware needs at least 128Mi",
            );
            errors.require(
                !self.disks.is_empty(),
                "spec.disks",
                "firmware boots a disk, and there is none",
            );
        }
    }

    fn check_interfaces(&self, uid: Option<&str>, errors: &mut Errors) {
        for (index, interface) in self.interfaces.iter().enumerate() {
            let path = format!("spec.interfaces[{index}]");
            errors.interface(interface, &path);
            let twice = self.interfaces[..index]
                .iter()
                .any(|other| other.name == interface.name);
            errors.require(!twice, &format!("{path}.name"), "the name is used twice");
            let address = interface.effective_mac(uid);
            let twice = address.is_some()
                && self.interfaces[..index]
                    .iter()
                    .any(|other| other.effective_mac(uid) == address);
            errors.require(!twice, &format!("{path}.mac"), SAME_MAC);
        }
    }

    fn check_availability(&self, errors: &mut Errors) {
        let limits = &self.availability.migration;
        let restart = &self.availability.restart;
        let day = 24 * 3600 * 1000;
        errors.duration(
            &limits.downtime,
            1,
            day,
            "spec.availability.migration.downtime",
        );
        for (duration, field) in [
            (
                &limits.live_timeout,
                "spec.availability.migration.liveTimeout",
            ),
            (
                &limits.quick_timeout,
                "spec.availability.migration.quickTimeout",
            ),
            (
                &limits.shutdown_timeout,
                "spec.availability.migration.shutdownTimeout",
            ),
        ] {
            errors.duration(duration, 1000, day, field);
        }
        if let Some(bandwidth) = &limits.bandwidth {
            let field = "spec.availability.migration.bandwidth";
            let bytes = errors.quantity(bandwidth, field);
            let enough = bytes.is_none_or(|bytes| bytes >= MIB);
            errors.require(
                enough,
                field,
                "bandwidth must be at least 1Mi (bytes per second)",
            );
        }
        errors.require(
            (0..=100).contains(&restart.attempts_max),
            "spec.availability.restart.attemptsMax",
            "0 to 100 restarts",
        );
        errors.duration(
            &restart.window,
            1000,
            u64::MAX,
            "spec.availability.restart.window",
        );
        errors.duration(
            &restart.backoff,
            0,
            u64::MAX,
            "spec.availability.restart.backoff",
        );
    }
}

/// The MAC address of a virtual machine's interface without one: locally administered,
/// unicast, and the same wherever and whenever it is derived.
#[must_use]
pub fn mac_address(vm_uid: &str, interface: &str) -> [u8; 6] {
    let digest = Sha256::digest(format!("{vm_uid}/{interface}"));
    [0x02, digest[0], digest[1], digest[2], digest[3], digest[4]]
}

/// The bytes of a MAC address, in either case, with colons; none when the text is none.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits)?;
    }
    parts.next().is_none().then_some(mac)
}

impl Interface {
    /// The address that the guest sees: the one asked for, or the one derived from the UID. None
    /// when what was asked for is no address, or when there is no UID yet.
    #[must_use]
    pub fn effective_mac(&self, vm_uid: Option<&str>) -> Option<[u8; 6]> {
        match &self.mac {
            Some(text) => parse_mac(text),
            None => vm_uid.map(|uid| mac_address(uid, &self.name)),
        }
    }
}

/// The errors so far.
struct Errors(Vec<FieldError>);

impl Errors {
    fn require(&mut self, holds: bool, field: &str, message: &str) {
        if !holds {
            self.0.push(FieldError {
                field: field.to_owned(),
                message: message.to_owned(),
            });
        }
    }

    fn quantity(&mut self, quantity: &Quantity, field: &str) -> Option<u64> {
        let parsed = quantity.to_bytes();
        if let Err(error) = &parsed {
            self.require(false, field, &error.to_string());
        }
        parsed.ok()
    }

    fn duration(&mut self, duration: &Duration, min_ms: u64, max_ms: u64, field: &str) {
        match duration.to_std() {
            Ok(std) => {
                let ms = u64::try_from(std.as_millis()).unwrap_or(u64::MAX);
                let sane = (min_ms..=max_ms).contains(&ms);
                let least = std::time::Duration::from_millis(min_ms);
                self.require(
                    sane,
                    field,
                    &format!("too short or too long; at least {least:?}"),
                );
            }
            Err(error) => self.require(false, field, &error.to_string()),
        }
    }

    fn source(&mut self, source: &Source, field: &str) {
        source.check(field, &mut |holds, field, message| {
            self.require(holds, field, message);
        });
    }

    fn disk(&mut self, disk: &Disk, field: &str) {
        let named = is_label(&disk.name) && !disk.name.starts_with("boot-");
        let message = "a disk's name is a DNS label and does not begin with boot-";
        self.require(named, &format!("{field}.name"), message);
        self.require(
            disk.source.is_none() || disk.existing.is_none(),
            field,
            "set source for a new disk or existing for a kept one, not both",
        );
        self.require(
            disk.existing.is_some() != disk.size.is_some(),
            &format!("{field}.size"),
            "a new disk needs a size; a kept disk (existing) brings its own",
        );
        if let Some(size) = &disk.size {
            let bytes = self.quantity(size, &format!("{field}.size"));
            let sane = bytes.is_none_or(|bytes| (MIB..=64 * TIB).contains(&bytes));
            self.require(
                sane,
                &format!("{field}.size"),
                "a disk has at least 1Mi and at most 64Ti",
            );
        }
        if let Some(source) = &disk.source {
            self.source(source, &format!("{field}.source"));
        }
        if let Some(existing) = &disk.existing {
            let good = existing
                .name
                .split_once('.')
                .is_some_and(|(a, b)| is_label(a) && is_label(b));
            let message = "write it as <virtual machine>.<disk>, as the volume lists it";
            self.require(good, &format!("{field}.existing.name"), message);
        }
    }

    fn interface(&mut self, interface: &Interface, field: &str) {
        self.require(
            is_label(&interface.name),
            &format!("{field}.name"),
            DNS_LABEL,
        );
        let message = "a name from the administrator's allow-list";
        self.require(
            is_label(&interface.bridge),
            &format!("{field}.bridge"),
            message,
        );
        let good = interface.mac.as_deref().is_none_or(is_unicast_mac);
        let message = "a unicast address of six lower-case bytes, such as 02:00:00:12:34:56";
        self.require(good, &format!("{field}.mac"), message);
    }
}

/// In lower case, as everything that shows an address writes it.
fn is_unicast_mac(text: &str) -> bool {
    parse_mac(text).is_some_and(|mac| mac[0] & 1 == 0 && mac != [0; 6])
        && !text.bytes().any(|b| b.is_ascii_uppercase())
}

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// Memory of a guest that boots by firmware: what the firmware takes, and room for a boot loader and a kernel.
const FIRMWARE_MEMORY_MIN: u64 = 128 * MIB;
const KERNEL_ONLY: &str =
    "initrd and cmdline belong to a kernel: with firmware, the disk's boot loader has them";
const SAME_MAC: &str = "another interface has the same mac: give each its own, or leave mac out";
const DNS_LABEL: &str = "must be a DNS label: at most 63 lower-case letters, digits and hyphens";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Firmware, VirtualMachine};

    const GOOD: &str = r"
apiVersion: bascule.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web, namespace: default}
spec:
  memory: 512Mi
  volume: san
  boot:
    kernel: {hostFile: {name: debian-kernel}}
    cmdline: console=ttyS0
  disks:
  - {name: root, size: 1Gi, source: {hostFile: {name: debian-root}}}
  - {name: data, existing: {name: old.data}}
  interfaces:
  - {name: lan, bridge: lan}
";

    #[test]
    fn a_source_has_exactly_one_hash_of_the_right_length() {
        let source = |hashes: &str| {
            let http = format!("{{http: {{url: 'http://x/y'{hashes}}}}}");
            errors_of(&GOOD.replace("{hostFile: {name: debian-kernel}}", &http))
        };
        let sha256 = format!(", sha256: '{}'", "a".repeat(64));
        let sha512 = format!(", sha512: '{}'", "0".repeat(128));
        assert_eq!(source(&sha256), Vec::<String>::new());
        assert_eq!(source(&sha512), Vec::<String>::new());
        for (hashes, field) in [
            (String::new(), "spec.boot.kernel.http: set exactly one"),
            (
                format!("{sha256}{sha512}"),
                "spec.boot.kernel.http: set exactly one",
            ),
            (
                format!(", sha512: '{}'", "0".repeat(64)),
                "spec.boot.kernel.http.sha512: ",
            ),
            (
                format!("{sha256}, caBundle: /etc/ssl/ca.pem"),
                "spec.boot.kernel.http.caBundle: ",
            ),
            (
                format!(", sha256: '{}'", "A".repeat(64)),
                "spec.boot.kernel.http.sha256: ",
            ),
        ] {
            let errors = source(&hashes);
            assert!(
                errors.iter().any(|error| error.starts_with(field)),
                "{hashes}: {errors:?}"
            );
        }
    }

    fn errors_of(document: &str) -> Vec<String> {
        let vm: VirtualMachine = serde_saphyr::from_str(document).unwrap();
        match vm.spec.check(&vm.metadata) {
            Ok(()) => vec![],
            Err(errors) => errors.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_sound_document_passes() {
        assert_eq!(errors_of(GOOD), Vec::<String>::new());
    }

    #[test]
    fn a_virtual_machine_without_a_kernel_boots_by_firmware() {
        let boot =
            "  boot:\n    kernel: {hostFile: {name: debian-kernel}}\n    cmdline: console=ttyS0\n";
        for firmware in ["", "  boot: {firmware: {}}\n"] {
            let document = GOOD.replace(boot, firmware);
            assert_ne!(document, GOOD);
            let vm: VirtualMachine = serde_saphyr::from_str(&document).unwrap();
            assert_eq!(
                (vm.spec.boot.kernel, vm.spec.boot.firmware),
                (None, Some(Firmware {}))
            );
            assert_eq!(errors_of(&document), Vec::<String>::new());
            let small = errors_of(&document.replace("512Mi", "126Mi"));
            assert_eq!(small, ["spec.memory: firmware needs at least 128Mi"]);
            let (before, rest) = document.split_once("  disks:").unwrap();
            let (_, after) = rest.split_once("  interfaces:").unwrap();
            let diskless = errors_of(&format!("{before}  interfaces:{after}"));
            assert_eq!(
                diskless,
                ["spec.disks: firmware boots a disk, and there is none"]
            );
        }
    }

    #[test]
    fn exactly_one_of_firmware_and_kernel_is_booted() {
        let kernel = "    kernel: {hostFile: {name: debian-kernel}}\n";
        let both = format!("    firmware: {{}}\n{kernel}");
        for (boot, error) in [
            (both.as_str(), "spec.boot: set exactly one"),
            ("", "spec.boot: set exactly one"),
            ("    firmware: {}\n", "spec.boot: initrd and cmdline belong"),
        ] {
            let errors = errors_of(&GOOD.replace(kernel, boot));
            assert!(errors[0].starts_with(error), "{errors:?}");
        }
    }

    #[test]
    fn every_bad_value_is_reported_with_its_field() {
        for (from, to, field) in [
            ("name: web", "name: Web", "metadata.name"),
            ("512Mi", "-1", "spec.memory"),
            ("512Mi", "1Mi", "spec.memory"),
            ("512Mi", "'0'", "spec.memory"),
            ("512Mi", "99999999Ti", "spec.memory"),
            (
                "memory: 512Mi",
                "memory: 512Mi\n  cpu: {cores: -4}",
                "spec.cpu.cores",
            ),
            (
                "memory: 512Mi",
                "memory: 512Mi\n  cpu: {cores: 100000}",
                "spec.cpu.cores",
            ),
            ("512Mi", "17Mi", "spec.memory"),
            ("512Mi", "5Ti", "spec.memory"),
            (
                "{hostFile: {name: debian-kernel}}",
                "{}",
                "spec.boot.kernel",
            ),
            (
                "debian-kernel",
                "/boot/vmlinuz",
                "spec.boot.kernel.hostFile.name",
            ),
            (
                "{hostFile: {name: debian-kernel}}",
                "{http: {url: 'ftp://x/y', sha256: ''}}",
                "spec.boot.kernel.http.url",
            ),
            ("volume: san", "volume: ''", "spec.volume"),
            ("name: root", "name: boot-kernel", "spec.disks[0].name"),
            ("size: 1Gi, ", "", "spec.disks[0].size"),
            ("name: data,", "name: root,", "spec.disks[1].name"),
            ("old.data", "data", "spec.disks[1].existing.name"),
            ("bridge: lan", "bridge: ../lan", "spec.interfaces[0].bridge"),
            (
                "bridge: lan",
                "bridge: lan, mac: '01:00:00:00:00:01'",
                "spec.interfaces[0].mac",
            ),
            (
                "memory: 512Mi",
                "memory: 512Mi\n  cpu: {cores: 0}",
                "spec.cpu.cores",
            ),
            (
                "memory: 512Mi",
                "memory: 512Mi\n  availability: {migration: {liveTimeout: 0s}}",
                "spec.availability.migration.liveTimeout",
            ),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let errors = errors_of(&GOOD.replacen(from, to, 1));
            assert!(
                errors
                    .iter()
                    .any(|error| error.starts_with(&format!("{field}:"))),
                "{to}: {errors:?}"
            );
        }
    }

    /// Regression: without quotes, only text was taken.
    #[test]
    fn a_quantity_may_be_a_number_in_every_field() {
        for (from, to) in [
            ("512Mi", "536870912"),
            ("size: 1Gi", "size: 1073741824"),
            (
                "memory: 512Mi",
                "memory: 512Mi\n  availability: {migration: {bandwidth: 1048576}}",
            ),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let document = GOOD.replacen(from, to, 1);
            assert_eq!(errors_of(&document), Vec::<String>::new(), "{to}");
        }
        for (from, to, field) in [
            ("512Mi", "536870911", "spec.memory"),
            ("512Mi", "1.5", "spec.memory"),
            ("512Mi", "0", "spec.memory"),
            ("size: 1Gi", "size: 1048575", "spec.disks[0].size"),
            ("size: 1Gi", "size: -1", "spec.disks[0].size"),
            (
                "memory: 512Mi",
                "memory: 512Mi\n  availability: {migration: {bandwidth: 1048575}}",
                "spec.availability.migration.bandwidth",
            ),
        ] {
            let errors = errors_of(&GOOD.replacen(from, to, 1));
            let named = |error: &String| error.starts_with(&format!("{field}:"));
            assert!(errors.iter().any(named), "{to}: {errors:?}");
        }
    }

    /// A number has no unit: 300 may be meant as seconds or as milliseconds.
    #[test]
    fn a_duration_without_a_unit_is_refused_with_an_example() {
        for field in [
            "migration: {downtime: 300}",
            "migration: {liveTimeout: 300}",
            "migration: {quickTimeout: 300}",
            "migration: {shutdownTimeout: 300}",
            "restart: {window: 600}",
            "restart: {backoff: 10}",
        ] {
            let to = format!("memory: 512Mi\n  availability: {{{field}}}");
            let errors = errors_of(&GOOD.replacen("memory: 512Mi", &to, 1));
            let path = field.replace(": {", ".");
            let path = format!("spec.availability.{}: ", &path[..path.find(':').unwrap()]);
            assert!(
                errors.len() == 1 && errors[0].starts_with(&path) && errors[0].contains("90s"),
                "{field}: {errors:?}"
            );
        }
    }

    #[test]
    fn a_mac_is_one_unicast_address_in_lower_case() {
        for (mac, good) in [
            ("02:00:00:12:34:56", true),
            ("52:54:00:aa:bb:cc", true),
            ("00:00:00:00:00:01", true),
            ("00:00:00:00:00:00", false),
            ("ff:ff:ff:ff:ff:ff", false),
            ("01:00:5e:00:00:01", false),
            ("33:33:00:00:00:01", false),
            ("52:54:00:AA:BB:CC", false),
            ("02-00-00-12-34-56", false),
            ("0200.0012.3456", false),
            ("2:0:0:12:34:56", false),
            ("+2:00:00:12:34:56", false),
            ("02:00:00:12:34", false),
            ("02:00:00:12:34:56:78", false),
        ] {
            let to = format!("bridge: lan, mac: '{mac}'");
            let errors = errors_of(&GOOD.replacen("bridge: lan", &to, 1));
            assert_eq!(errors.is_empty(), good, "{mac}: {errors:?}");
            let named = |error: &String| error.starts_with("spec.interfaces[0].mac:");
            assert!(errors.iter().all(named), "{mac}: {errors:?}");
        }
    }

    /// Regression: two interfaces of a guest could have one address.
    #[test]
    fn two_interfaces_with_one_mac_are_refused() {
        let with = |uid: &str, first: &str, second: &str| {
            let lan = format!("{{name: lan, bridge: lan{first}}}");
            let both = format!("{lan}\n  - {{name: wan, bridge: wan{second}}}");
            let document = GOOD.replacen("{name: lan, bridge: lan}", &both, 1);
            errors_of(&document.replacen("name: web", &format!("name: web{uid}"), 1))
        };
        let (a, b) = (", mac: '02:00:00:00:00:0a'", ", mac: '02:00:00:00:00:0b'");
        assert_eq!(with("", a, b), Vec::<String>::new());
        assert_eq!(with("", "", ""), Vec::<String>::new());
        let errors = with("", a, a);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].starts_with("spec.interfaces[1].mac: "),
            "{errors:?}"
        );
        // The address that another interface is given by default counts too.
        let derived = mac_address("u-1", "lan").map(|byte| format!("{byte:02x}"));
        let derived = format!(", mac: '{}'", derived.join(":"));
        assert_eq!(with(", uid: u-2", "", &derived), Vec::<String>::new());
        let errors = with(", uid: u-1", "", &derived);
        assert!(
            errors[0].starts_with("spec.interfaces[1].mac: "),
            "{errors:?}"
        );
    }

    #[test]
    fn a_derived_mac_is_local_unicast_and_stable() {
        let mac = mac_address("6fa459ea-ee8a-4ca4-894e-db77e160355e", "lan");
        assert_eq!(mac[0], 0x02);
        assert_eq!(
            mac,
            mac_address("6fa459ea-ee8a-4ca4-894e-db77e160355e", "lan")
        );
        assert_ne!(
            mac,
            mac_address("6fa459ea-ee8a-4ca4-894e-db77e160355e", "wan")
        );
    }
}
