#!/bin/busybox sh
# The guest's only process. Each round it writes files of random bytes to a tmpfs, and checks all
# the files that the last rounds left there.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs work /work
cd /work || exit 1
keep=12
round=0
while :; do
    round=$((round + 1))
    for part in 1 2 3 4; do
        { echo "ramsnap round $round part $part"; $b head -c 65536 /dev/urandom; } >$round.$part
    done
    $b md5sum $round.? >$round.sums
    [ $round -le $keep ] || $b rm $((round - keep)).*
    files=$((4 * (round < keep ? round : keep)))
    whole=$($b cat *.sums | $b md5sum -c 2>/dev/null | $b grep -c ': OK$')
    if [ "$whole" = $files ]; then
        echo "round $round: $files files ok"
    else
        echo "round $round: BROKEN, $whole of $files files are whole"
    fi
done
