//! What more than one of Cofferdam's crates needs of the kernel: once, and without unsafe callers,
//! of which [`process::fork`] alone must have some. What rustix or nix makes safe is called there.

pub mod bpf;
pub mod byte_lock;
pub mod loop_device;
pub mod mount;
pub mod point;
pub mod process;
pub mod socket_table;

use std::fmt::Write;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose guarded value stays whole when a holder panics.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The result of a raw system call or of a function of the C library that sets `errno`.
///
/// # Errors
/// The kernel's number, when the result is negative.
pub fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Gives freed memory back to the kernel, which the allocator of the C library would keep for more.
pub fn trim_heap() {
    // SAFETY: it takes the allocator's own locks, and touches what is free only.
    unsafe { libc::malloc_trim(0) };
}

/// A hardware address as ip(8) shows it: two hexadecimal digits for each byte, joined by colons.
pub fn mac_text(address: &[u8]) -> String {
    let mut text = String::with_capacity(address.len() * 3);
    for (index, byte) in address.iter().enumerate() {
        let colon = if index == 0 { "" } else { ":" };
        let _ = write!(text, "{colon}{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_has_two_digits_for_each_byte() {
        assert_eq!(
            mac_text(&[0x02, 0, 0x0a, 0xff, 1, 0x10]),
            "02:00:0a:ff:01:10"
        );
    }
}
