//! What more than one of Cofferdam's crates needs of the kernel: once, and without unsafe callers.

pub mod point;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose guarded value stays whole when a holder panics.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
