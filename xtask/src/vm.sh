#!/bin/sh
# The first process of the test machine: a pure control group v2, then every test binary that the second disk has.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /tests
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
modprobe loop
# Here is dm-crypt: tests of encrypted volumes fail if they do not find it.
export DUNLIN_TEST_DM_CRYPT=1
ip link set lo up
echo 'nameserver 192.0.2.53' > /etc/resolv.conf
# The paths that were compiled into the tests are the same here.
mount /dev/vdb /tests
failed=0
while read -r target dir binary only; do
    mkdir -p "$(dirname "$target")" && ln -sfn /tests/target "$target"
    mkdir -p "$dir"
    echo "vm: $binary on $(uname -r), $(stat -fc %T /sys/fs/cgroup)"
    # No word at all if all of them are wanted.
    # shellcheck disable=SC2086
    (cd "$dir" && "$target/$binary" --test-threads=2 $only; echo $? > /run/code) | tee /run/output
    if [ "$(cat /run/code)" != 0 ]; then
        # Once more, alone, as everywhere: the names are in the output, by which this is told to have happened.
        names=$(sed -n 's/^test \([^ ]*\) \.\.\. FAILED.*/\1/p' /run/output)
        echo "vm: $binary failed; once more, alone:" $names
        # shellcheck disable=SC2086
        { [ -n "$names" ] && [ "$(echo $names | wc -w)" -le 5 ] && (cd "$dir" && "$target/$binary" --exact --test-threads=1 $names); } || failed=1
    fi
done < /tests/list
echo "vm-result: $failed"
sync
echo o > /proc/sysrq-trigger
sleep 60
