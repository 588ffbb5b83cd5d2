//! Events: things that QEMU tells unasked. Any name parses; some are rate-limited by QEMU, so an
//! event is a hint and a query is the truth. `events!` lists those that are read, as types.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `SHUTDOWN`, `DEVICE_DELETED`, … including ones this crate never heard of.
    pub name: String,
    /// What comes with it; null if nothing does.
    pub data: Value,
}

/// An event that is read: its fields are what is read of its data. All may be missing, because what
/// QEMU says is not to be relied on.
pub(crate) trait Known: DeserializeOwned + Default {
    /// As QEMU calls it.
    const NAME: &'static str;
}

/// What is told of each event that is read; for tests.
#[cfg(test)]
pub(crate) trait Visit {
    /// The next one.
    fn event<K: Known>(&mut self);
}

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident { $($field:ident),* } = $wire:literal;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Default, Deserialize)]
            pub(crate) struct $name { $($field: Option<String>),* }
            impl Known for $name {
                const NAME: &'static str = $wire;
            }
        )*

        /// Shows `visitor` every event that is read.
        #[cfg(test)]
        pub(crate) fn each(visitor: &mut impl Visit) {
            $(visitor.event::<$name>();)*
        }
    };
}

events! {
    /// A device is gone.
    DeviceDeleted { device } = "DEVICE_DELETED";
    /// The guest keeps a device that it was asked to let go of.
    DeviceUnplugGuestError { device } = "DEVICE_UNPLUG_GUEST_ERROR";
    /// The guest's kernel panicked, and a device of the guest's said so.
    GuestPanicked {} = "GUEST_PANICKED";
    /// QEMU is about to end.
    Shutdown { reason } = "SHUTDOWN";
}

/// Why QEMU ends, by its words and by ours.
pub(crate) const SHUTDOWN_REASONS: [(&str, &str); 5] = [
    ("guest-shutdown", "the guest powered off"),
    (
        "guest-reset",
        "the guest rebooted (its kernel panicked, or its init asked for it)",
    ),
    ("guest-panic", PANICKED),
    ("host-qmp-quit", "it was asked to quit"),
    ("host-signal", "it was asked to end by a signal"),
];

const PANICKED: &str = "the guest kernel panicked";

impl Event {
    /// What it says, if it is one of these.
    fn read<K: Known>(&self) -> Option<K> {
        (self.name == K::NAME).then(|| K::deserialize(&self.data).unwrap_or_default())
    }

    /// Whether the device with this id is gone.
    pub(crate) fn is_end_of(&self, id: &str) -> bool {
        self.read::<DeviceDeleted>()
            .is_some_and(|gone| gone.device.as_deref() == Some(id))
    }

    /// Whether the guest keeps the device with this id.
    pub(crate) fn is_refusal_of(&self, id: &str) -> bool {
        self.read::<DeviceUnplugGuestError>()
            .is_some_and(|kept| kept.device.as_deref() == Some(id))
    }

    /// For an event that explains the end of a virtual machine, a few words that say so.
    pub(crate) fn last_word(&self) -> Option<String> {
        if self.read::<GuestPanicked>().is_some() {
            return Some(PANICKED.into());
        }
        let reason = self.read::<Shutdown>()?.reason;
        let reason = reason.as_deref().unwrap_or("no reason given");
        let known = SHUTDOWN_REASONS
            .iter()
            .find(|(theirs, _)| *theirs == reason);
        Some(match known {
            Some((_, ours)) => (*ours).into(),
            None => format!("it shut down ({reason})"),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event {
            name: name.into(),
            data,
        }
    }

    #[test]
    fn a_shutdown_says_who_wanted_it() {
        let reset = event("SHUTDOWN", json!({"guest": true, "reason": "guest-reset"}));
        assert!(reset.last_word().unwrap().contains("rebooted"));
        assert_eq!(
            event("SHUTDOWN", json!({"reason": "new-one"}))
                .last_word()
                .unwrap(),
            "it shut down (new-one)"
        );
        for nothing in [Value::Null, json!({"reason": 5})] {
            assert_eq!(
                event("SHUTDOWN", nothing).last_word().unwrap(),
                "it shut down (no reason given)"
            );
        }
        assert_eq!(
            event("GUEST_PANICKED", json!({"action": "run"})).last_word(),
            Some(PANICKED.into())
        );
        assert_eq!(event("STOP", Value::Null).last_word(), None);
    }

    #[test]
    fn the_end_of_a_device_is_no_other_devices() {
        let gone = event("DEVICE_DELETED", json!({"device": "blk1", "path": "/x"}));
        assert!(gone.is_end_of("blk1") && !gone.is_end_of("blk10"));
        assert!(!gone.is_refusal_of("blk1"));
        // One without an id has only a path.
        assert!(!event("DEVICE_DELETED", json!({"path": "blk1"})).is_end_of("blk1"));
        let kept = event("DEVICE_UNPLUG_GUEST_ERROR", json!({"device": "blk1"}));
        assert!(kept.is_refusal_of("blk1") && !kept.is_end_of("blk1"));
    }
}
