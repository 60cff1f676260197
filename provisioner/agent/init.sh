#!/bin/sh
# The ramdisk's first process: drivers, the provisioning NIC, then the agent. It opens no
# shell for anyone; whatever happens, it ends by restarting the host, which then boots from
# its own disk unless the service says otherwise.
export PATH=/sbin:/bin:/usr/sbin:/usr/bin

readonly MODULE_ROUNDS_MAX=6
readonly NIC_TRIES_MAX=50
readonly DHCP_TRIES_MAX=20
readonly PAUSE_BEFORE_RESTART_S=30
# Of 2 MiB each: a buffer for each thread of the agent, and a few more.
readonly HUGE_PAGES=20

say() {
    read -r now _ < /proc/uptime
    echo "[$now] init: $*" > /dev/console
}

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,noexec devtmpfs /dev 2> /dev/null
mount -t tmpfs -o nosuid,nodev,mode=0755,size=32m tmpfs /run

# A small host may have room for fewer; the agent takes what there is.
echo "$HUGE_PAGES" > /proc/sys/vm/nr_hugepages 2> /dev/null

# What the devices on the buses of disks and NICs call themselves. Looking through all of
# /sys takes a second each time on an emulated host.
modaliases() {
    cat /sys/bus/pci/devices/*/modalias /sys/bus/virtio/devices/*/modalias \
        /sys/bus/vmbus/devices/*/modalias /sys/bus/xen/devices/*/modalias \
        /sys/bus/usb/devices/*/modalias /sys/bus/scsi/devices/*/modalias \
        /sys/bus/mmc/devices/*/modalias 2> /dev/null
}

# Loading the driver of a bus shows new devices on it; go on until no new one shows. A
# module is loaded when its devices have been scanned (scsi_mod.scan=sync), so that the list
# of disks is complete afterwards.
load_drivers() {
    seen=""
    round=0
    while [ "$round" -lt "$MODULE_ROUNDS_MAX" ]; do
        round=$((round + 1))
        aliases=$(modaliases | sort -u)
        [ "$aliases" = "$seen" ] && break
        seen=$aliases
        # Side by side, since some drivers wait for their hardware most of the time.
        echo "$aliases" | xargs -n 4 -P 4 /sbin/modprobe -a -b -q
    done
    # USB sticks and virtual media are looked at a second after they are found.
    [ -d /sys/module/usb_storage ] && sleep 2
}

ask_dhcp() {
    udhcpc -i "$1" -n -q -t "$DHCP_TRIES_MAX" -T 1 -s /etc/provisioner/udhcpc.sh > /dev/null 2>&1
}

# provisioner.net=mac,address,netmask,gateway: what the firmware already got by DHCP. GRUB
# knows the MAC only, and then that NIC asks for itself.
network_from_firmware() {
    IFS=, read -r mac address netmask gateway <<- EOF
	$1
	EOF
    [ -n "$mac" ] || return 1
    tries=0
    while [ "$tries" -lt "$NIC_TRIES_MAX" ]; do
        for nic in /sys/class/net/*; do
            [ "$(cat "$nic/address")" = "$mac" ] || continue
            if [ -z "$address" ] || [ -z "$netmask" ]; then
                ifconfig "${nic##*/}" up && ask_dhcp "${nic##*/}"
                return
            fi
            ifconfig "${nic##*/}" "$address" netmask "$netmask" up || return 1
            [ -z "$gateway" ] || route add default gw "$gateway"
            return 0
        done
        tries=$((tries + 1))
        sleep 0.1
    done
    return 1
}

network_from_dhcp() {
    for nic in /sys/class/net/*; do
        [ "${nic##*/}" = lo ] || ifconfig "${nic##*/}" up
    done
    for nic in /sys/class/net/*; do
        [ "${nic##*/}" = lo ] && continue
        ask_dhcp "${nic##*/}" && return 0
    done
    return 1
}

# OpenSSL picks its code by what the processor offers. QEMU's emulation offers vector units
# that are slower than plain code: sha256 63 MiB/s with AVX2, 85 without AVX and SSSE3.
if grep -q "QEMU TCG" /proc/cpuinfo && ! grep -q sha_ni /proc/cpuinfo; then
    export OPENSSL_ia32cap="~0x1000020000000000:~0x120"
fi

bring_up() {
    load_drivers
    net=""
    read -r command_line < /proc/cmdline
    for word in $command_line; do
        case $word in
            provisioner.net=*) net=${word#provisioner.net=} ;;
        esac
    done
    network_from_firmware "$net" || network_from_dhcp || say "no network: no NIC got an address"
}

# Buffers of a chunk are made and dropped all the time; giving their memory back to the
# kernel each time, as malloc does by default, costs more than using it.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864

# Python starts while the drivers load; the agent waits for the end of its standard input,
# which is the end of bring_up.
bring_up | python3.11 -I -S -B -c 'from provisioner.agent.main import main; main()'
# The agent restarts the host itself. Coming here means that it broke.
say "the agent ended with $?; restarting in $PAUSE_BEFORE_RESTART_S s"
sleep "$PAUSE_BEFORE_RESTART_S"
reboot -f
