# Each target is one script or one cargo call; `make demo` and `make test` need
# nothing but a bare Debian 12.
PREFIX ?= /usr/local

.PHONY: setup guest build install demo test test-qemu test-stock test-programs test-docker test-containerd fuzz test-kvm conformance bench killtest clean

setup:
	scripts/setup

guest: setup
	scripts/kernel
	scripts/initramfs

build: guest
	cargo build --locked --release -p cofferdam-shim

install: build
	scripts/install $(PREFIX)

demo:
	scripts/demo

test:
	scripts/test

test-kvm:
	scripts/test-kvm

test-qemu:
	scripts/test qemu

test-stock:
	scripts/test stock

test-programs:
	scripts/test programs

test-docker:
	scripts/test docker

test-containerd:
	scripts/test containerd

fuzz:
	scripts/fuzz

conformance:
	scripts/conformance

bench:
	scripts/test bench

killtest:
	scripts/test killtest

clean:
	rm -rf target
