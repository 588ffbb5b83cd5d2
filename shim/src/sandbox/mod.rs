//! One sandbox: what may happen in which state (`state`), who makes it happen (`driver`), how its
//! virtual machine comes up (`launch`) and how everything it left on the host is undone (`ledger`).

pub mod dir;
pub mod driver;
pub mod ending;
pub mod launch;
pub mod ledger;
pub mod mounts;
mod nics;
mod place;
mod pod_api;
mod process;
mod reach;
mod sizing;
pub mod state;
mod tasks;
