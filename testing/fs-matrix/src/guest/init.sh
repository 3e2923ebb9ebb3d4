#!/bin/busybox sh
# The guest's first process: lays the unpacked packages over the host's root, and runs what the
# kernel's command line says.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in virtio_pci 9pnet_virtio 9p overlay virtio_blk virtio_console; do
    $b modprobe $module || echo "no module $module"
done
share=ro,trans=virtio,version=9p2000.L,cache=loose,msize=262144
$b mount -t 9p host /host -o $share
$b mount -t 9p tree /tree -o $share
$b mount -t tmpfs upper /upper
$b mkdir /upper/root /upper/work
$b mount -t overlay root /root -o lowerdir=/tree:/host,upperdir=/upper/root,workdir=/upper/work
for dir in proc sys dev; do
    $b mount --move /$dir /root/$dir
done
$b mkdir -p /root/lib/modules
$b cp -a /lib/modules/. /root/lib/modules/
for dir in tmp run mnt srv; do
    $b mount -t tmpfs $dir /root/$dir
done
$b ip link set lo up
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec $b switch_root /root /bin/sh -c '/fs-matrix/fs-matrix "$@"; exec /bin/busybox poweroff -f' sh "$@"
