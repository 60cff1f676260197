#!/bin/sh
# What busybox udhcpc runs when it has a lease: set the address and the route, nothing else.
# shellcheck disable=SC2154 # interface, ip, subnet and router are set by udhcpc
[ "$1" = bound ] || exit 0
ifconfig "$interface" "$ip" netmask "$subnet" up
[ -z "$router" ] || route add default gw "${router%% *}"
