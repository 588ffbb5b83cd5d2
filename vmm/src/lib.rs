//! QEMU, and nothing but QEMU.
