#!/bin/bash
# Builds IMAGE (localhost/weir:local) of Dockerfile.production with no daemon and no registry of images: by buildah, on bases that are made of
# Debian's packages here, with the toolchain and the crates of this machine. As root.
#   tests/stack/image-build.sh [TARGET]     # redirect, or nothing
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${IMAGE:-localhost/weir:local}
work=$PWD/target/image
mkdir -p "$work"
export CONTAINERS_CONF=$PWD/tests/stack/containers.conf

if ! podman image exists localhost/weir-build-base:local; then
    rm -rf "$work/debian"
    debootstrap --variant=minbase --include=gcc,libc6-dev,ca-certificates bookworm "$work/debian"
    tar -C "$work/debian" -c . | podman import -q --change 'ENV CARGO_HOME=/usr/local/cargo' \
        --change 'ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - localhost/weir-build-base:local
    # What distroless/cc has: glibc, libgcc, authorities and a user.
    base=$work/runtime
    rm -rf "$base"
    mkdir -p "$base"/{etc/ssl/certs,usr/lib/x86_64-linux-gnu,usr/lib64,tmp,proc,sys,dev,run}
    for library in ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libgcc_s.so.1 libresolv.so.2 libnss_dns.so.2 libnss_files.so.2; do
        cp -L "$work/debian/lib/x86_64-linux-gnu/$library" "$base/usr/lib/x86_64-linux-gnu/"
    done
    ln -s usr/lib "$base/lib"
    ln -s usr/lib64 "$base/lib64"
    ln -s ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$base/usr/lib64/"
    cp "$work/debian/etc/ssl/certs/ca-certificates.crt" "$base/etc/ssl/certs/"
    echo 'nonroot:x:65532:65532::/:/sbin/nologin' >"$base/etc/passwd"
    echo 'nonroot:x:65532:' >"$base/etc/group"
    echo 'hosts: files dns' >"$base/etc/nsswitch.conf"
    chmod 1777 "$base/tmp"
    tar -C "$base" -c . | podman import -q - localhost/weir-runtime-base:local
    rm -rf "$work/debian" "$base"
fi

# Without link-time optimisation, unless told: it takes longer than all else.
# shellcheck disable=SC2086 # words
buildah bud --isolation chroot --pull-never --layers --format docker -f Dockerfile.production -t "$image" ${1:+--target "$1"} \
    --build-arg BUILD_BASE=localhost/weir-build-base:local --build-arg RUNTIME_BASE=localhost/weir-runtime-base:local \
    --build-arg NFT_BASE=localhost/weir-build-base:local --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)" \
    --build-arg REVISION="$(git rev-parse HEAD)" \
    ${BUILD_ARGS---build-arg CARGO_PROFILE_RELEASE_LTO=off --build-arg CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 --build-arg CARGO_PROFILE_RELEASE_OPT_LEVEL=1} \
    --volume "$(rustc --print sysroot):/usr/local/rust:ro" --volume "${CARGO_HOME:-$HOME/.cargo}/registry:/usr/local/cargo/registry" .
