# Connects an emulated node to the lab's SAN and keeps its paths: $1 is the node's name, $2 the SAN's address.
node=$1 san=$2
target=iqn.2026-01.dev.bascule:san
# There is no udev: dmsetup makes the device nodes itself.
export DM_DISABLE_UDEV=1

for module in sd_mod iscsi_tcp dm_multipath dm_round_robin; do modprobe $module; done
mkdir -p /etc/iscsi /run/lock/iscsi /dev/disk/by-id
echo "InitiatorName=iqn.2026-01.dev.bascule:$node" > /etc/iscsi/initiatorname.iscsi
# A path counts as lost 2 + 2 + 3 s after its last answer, as installations with multipath set it.
cat > /etc/iscsi/iscsid.conf <<'CONF'
node.startup = manual
node.session.auth.authmethod = None
node.session.timeo.replacement_timeout = 3
node.conn[0].timeo.login_timeout = 3
node.conn[0].timeo.logout_timeout = 3
node.conn[0].timeo.noop_out_interval = 2
node.conn[0].timeo.noop_out_timeout = 2
node.session.cmds_max = 32
node.session.queue_depth = 16
node.session.iscsi.InitialR2T = Yes
node.session.iscsi.ImmediateData = Yes
node.session.iscsi.FirstBurstLength = 262144
node.session.iscsi.MaxBurstLength = 262144
node.conn[0].iscsi.MaxRecvDataSegmentLength = 262144
CONF
iscsid -f &

# The disk behind a portal's port.
disk() {
    for connection in /sys/class/iscsi_connection/*; do
        [ "$(cat "$connection/persistent_port")" = "$1" ] || continue
        for block in "$connection"/device/../target*/*/block/*; do
            [ -e "$block" ] && echo "${block##*/}"
        done
    done
}

for port in 3260 3261; do
    # Fails until iscsid listens.
    until iscsiadm -m node -T $target -p $san:$port -o new && iscsiadm -m node -T $target -p $san:$port --login; do
        # Of an earlier run of this script.
        [ -n "$(disk $port)" ] && break
        sleep 0.5
    done
    until [ -n "$(disk $port)" ]; do sleep 0.2; done
done
a=$(disk 3260) b=$(disk 3261)
number_a=$(cat /sys/block/$a/dev) number_b=$(cat /sys/block/$b/dev)
if ! dmsetup info san > /dev/null; then
    size=$(cat /sys/block/$a/size)
    paths="2 1 round-robin 0 1 1 $number_a 1 round-robin 0 1 1 $number_b 1"
    dmsetup create san-paths --table "0 $size multipath 1 queue_if_no_path 0 $paths"
    dmsetup create san --table "0 $size linear /dev/mapper/san-paths 0"
fi
ln -sf /dev/mapper/san /dev/disk/by-id/lab-san
echo "connected: $a $b"

# What multipathd does after its path check: a path that was seen down is reinstated when it is up again. Without a
# process per round: an emulated node feels each of them.
down= round=0
while sleep 1; do
    round=$((round + 1))
    for path in "$a $number_a" "$b $number_b"; do
        read -r state < /sys/block/${path% *}/device/state || continue
        number=${path#* }
        if [ "$state" != running ]; then
            case "$down" in *" $number "*) ;; *) down="$down $number " ;; esac
            continue
        fi
        # Now and then in any case: this loop may have slept over an outage.
        case "$down" in *" $number "*) ;; *) [ $((round % 30)) = 0 ] || continue ;; esac
        case "$(dmsetup status san-paths)" in
            *" $number F"*) dmsetup message san-paths 0 "reinstate_path $number" && echo "reinstated $path" ;;
            *" $number A"*) down=${down%" $number "*}${down#*" $number "} ;;
        esac
    done
done
