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
    esac
done
busybox ifconfig eth0 "$address" netmask "$netmask" up
say "begin"
# Word splitting is wanted: no option is no argument.
# shellcheck disable=SC2086
curl -sSf "$image" | zstd -d -c | /bin/dd of=/dev/vda bs=1M ${options:-} || {
    say "FAILED"
    busybox sleep 600
}
say "written"
busybox sync
say "synced"
busybox reboot -f
