#!/bin/busybox sh
# shellcheck shell=dash
# The floor's whole work: drivers, the address that the firmware got, one pipe, restart.
export PATH=/bin:/sbin
# shellcheck disable=SC3040
set -o pipefail

say() {
    read -r now _ < /proc/uptime
    echo "[$now] floor: $*" > /dev/console
}

fail() {
    say "FAILED"
    busybox sleep 600
}

busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev 2> /dev/null
# Programs of this name that the shell has itself would come first, hence the path.
/sbin/modprobe -a -b -q virtio_pci virtio_blk virtio_net
read -r command_line < /proc/cmdline
for word in $command_line; do
    case $word in
        floor.address=*) address=${word#floor.address=} ;;
        floor.netmask=*) netmask=${word#floor.netmask=} ;;
        floor.image=*) image=${word#floor.image=} ;;
        floor.dd=*) options=${word#floor.dd=} ;;
        floor.bytes=*) bytes=${word#floor.bytes=} ;;
        floor.sha256=*) sha256=${word#floor.sha256=} ;;
    esac
done
busybox ifconfig eth0 "$address" netmask "$netmask" up
say "begin"
# Word splitting is wanted: no option is no argument.
# shellcheck disable=SC2086
curl -sSf "$image" | zstd -d -c | /bin/dd of=/dev/vda bs=1M ${options:-} || fail
say "written"
busybox sync
say "synced"
if [ -n "${sha256:-}" ]; then
    # What was written is still in memory, and shall come from the disk.
    echo 3 > /proc/sys/vm/drop_caches
    found=$(/bin/dd if=/dev/vda bs=1M count="$bytes" iflag=count_bytes | /bin/sha256sum)
    [ "${found%% *}" = "$sha256" ] || fail
    say "checked"
fi
busybox reboot -f
