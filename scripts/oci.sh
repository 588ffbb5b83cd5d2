# shellcheck shell=bash
# Writes OCI image archives without a registry, for `ctr image import`. Sourced after
# lib.sh; the caller sets $work, an empty directory of its own. The same input gives
# the same bytes.

blobs=${work:?}/image/blobs/sha256
manifests=
mkdir -p "$blobs"

pack() { tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$1" -cf - .; }

# blob FILE: moves FILE among the blobs; prints its descriptor's digest and size.
blob() {
    local digest size
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    size=$(stat -c %s "$1")
    mv "$1" "$blobs/$digest"
    printf '"digest":"sha256:%s","size":%s' "$digest" "$size"
}

# layer DIR: makes a layer of DIR's content; prints what `image` takes for it.
layer() {
    pack "$1" >"$work/blob"
    blob "$work/blob"
}

# image NAME SETTINGS LAYER...: adds an image; SETTINGS is the inside of its "config".
image() {
    local name=$1 settings=$2 entry digest config manifest diffs='' layers=''
    shift 2
    for entry in "$@"; do
        digest=${entry#*:\"}
        diffs+="${diffs:+,}\"${digest%%\"*}\""
        layers+="${layers:+,}{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",$entry}"
    done
    printf '{"architecture":"amd64","os":"linux","config":{%s},"rootfs":{"type":"layers","diff_ids":[%s]}}' \
        "$settings" "$diffs" >"$work/blob"
    config=$(blob "$work/blob")
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",%s},"layers":[%s]}' \
        "$config" "$layers" >"$work/blob"
    manifest=$(blob "$work/blob")
    manifests+="${manifests:+,}{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",$manifest,\"platform\":{\"architecture\":\"amd64\",\"os\":\"linux\"},\"annotations\":{\"io.containerd.image.name\":\"$name\",\"org.opencontainers.image.ref.name\":\"${name##*:}\"}}"
}

# archive OUTPUT.tar: writes the images added so far.
archive() {
    printf '{"schemaVersion":2,"manifests":[%s]}' "$manifests" >"$work/image/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$work/image/oci-layout"
    mkdir -p "$(dirname "$1")"
    pack "$work/image" >"$1.part"
    mv "$1.part" "$1"
}
