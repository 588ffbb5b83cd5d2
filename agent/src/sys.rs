//! Two helpers that every folder needs: the result of a raw system call, and a lock.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The result of a raw system call: a negative one stands for `errno`.
pub fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Locks a mutex. A panic under the lock elsewhere does not make the data worse than it is.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
