# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are for the scripts that source this
# What the scripts share: paths, progress lines, locks, root. Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cofferdam
prefix=$root/target/prefix

# The versions that the project is tested with. Tools are cached by them.
virtiofsd_version=1.14.0
vhost_device_vsock_version=0.3.0
cargo_deny_version=0.20.2
tools=$cache/tools-virtiofsd-$virtiofsd_version-vsock-$vhost_device_vsock_version
cargo_deny=$cache/cargo-deny-$cargo_deny_version

# crictl and critest, of the cri-tools that tests/cri-tools pins, and what is with them.
cri_tools=$cache/cri-tools-$(find "$root/tests/cri-tools" -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c1-16)
# A busybox whose shell runs the programs of its file system: Debian's dynamic one.
plain_busybox=$cache/busybox-bookworm/bin/busybox

# A user's PATH on Debian has no sbin, and a CI shell often not rustup's folder.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:$HOME/.cargo/bin"

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null; }

# rust-toolchain.toml names one release. Where rustup has it not and cannot get it, what the
# user's default is has to do.
if have rustup && [ -z "${RUSTUP_TOOLCHAIN:-}" ] && ! (cd "$root" && cargo --version) >/dev/null 2>&1; then
    RUSTUP_TOOLCHAIN=$(cd / && rustup default 2>/dev/null | cut -d' ' -f1)
    export RUSTUP_TOOLCHAIN
    say "rustup cannot get the Rust of rust-toolchain.toml: taking $RUSTUP_TOOLCHAIN"
fi

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "'$1' needs root: run this as root or install sudo"
    fi
}

# version_ge A B: is A at least B?
version_ge() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" = "$2" ]; }

# lock NAME: one holder of NAME for this user's cache, until the script ends.
lock() {
    mkdir -p "$cache"
    exec 9>"$cache/$1.lock"
    flock -n 9 || {
        say "waiting for another $1 build to finish"
        flock 9
    }
}

# slow WHAT LOG COMMAND...: runs COMMAND with its output in LOG and says every
# 20 s how far it got; on failure shows the end of LOG.
slow() {
    local what=$1 log=$2 began=$SECONDS pid
    shift 2
    "$@" >"$log" 2>&1 9>&- </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        for _ in {1..100}; do
            kill -0 "$pid" 2>/dev/null || break 2
            sleep 0.2
        done
        say "$what: $((SECONDS - began)) s, $(wc -l <"$log") steps so far"
    done
    wait "$pid" || {
        tail -n 25 "$log" >&2
        die "$what failed; the lines above are the end of its output"
    }
    say "$what: done after $((SECONDS - began)) s"
}

# debian_sources DIR: where this machine's apt gets Debian 12, for mmdebstrap: DIR/sources.list, and
# DIR/apt.conf with proxies, and what else is special about the way to the mirror.
debian_sources() {
    local list=$1/sources.list
    apt_sources >"$list"
    if [ ! -s "$list" ]; then
        apt-get -q update
        apt_sources >"$list"
    fi
    [ -s "$list" ] || die "apt's sources on this machine offer no Debian 12"
    apt-config dump Acquire | grep -v '""' >"$1/apt.conf" || true
}

apt_sources() {
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
        grep -E ' bookworm(-updates|-security)? ' || true
}

# The tests' own installation: the product, and the agent that means harm.
install_for_tests() {
    make -s -C "$root" install PREFIX="$prefix" >&2
    install -m 644 "$("$root/scripts/initramfs" cofferdam-hostile-agent)" "$prefix/share/cofferdam/hostile.cpio"
}

# The product with an agent that stands in for Kata's (agent/src/stock.rs), in target/prefix-stock.
install_with_stock_agent() {
    rm -rf "$root/target/prefix-stock"
    cp -a "$prefix" "$root/target/prefix-stock"
    install -m 644 "$("$root/scripts/initramfs" cofferdam-agent stock)" "$root/target/prefix-stock/share/cofferdam/initramfs.cpio"
}

# The same with kill points (sys/src/point.rs), for the suite kill_points: before the above, so
# that the shim that stays in the build directory is the free one.
install_with_points() {
    (cd "$root" && cargo build --locked --release -p cofferdam-shim --features points >&2)
    "$root/scripts/install" "$root/target/prefix-points"
}
