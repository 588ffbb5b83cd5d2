//! Events: things that QEMU tells unasked. Any name parses; some are rate-limited by QEMU, so an
//! event is a hint and a query is the truth.

use serde_json::Value;

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `SHUTDOWN`, `DEVICE_DELETED`, … including ones this crate never heard of.
    pub name: String,
    /// What comes with it; null if nothing does.
    pub data: Value,
}

impl Event {
    /// Whether it is `name` and about the device with this id.
    pub fn is_about(&self, name: &str, device: &str) -> bool {
        self.name == name && self.data["device"] == device
    }

    /// For an event that explains the end of a virtual machine, a few words that say so.
    pub(crate) fn last_word(&self) -> Option<String> {
        let reason = self.data["reason"].as_str().unwrap_or("no reason given");
        match self.name.as_str() {
            "GUEST_PANICKED" => Some("the guest kernel panicked".into()),
            "SHUTDOWN" => Some(match reason {
                "guest-shutdown" => "the guest powered off".into(),
                "guest-reset" => {
                    "the guest rebooted (its kernel panicked, or its init asked for it)".into()
                }
                "guest-panic" => "the guest kernel panicked".into(),
                "host-qmp-quit" => "it was asked to quit".into(),
                "host-signal" => "it was asked to end by a signal".into(),
                other => format!("it shut down ({other})"),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_shutdown_says_who_wanted_it() {
        let event = |name: &str, data| Event {
            name: name.into(),
            data,
        };
        let reset = event("SHUTDOWN", json!({"guest": true, "reason": "guest-reset"}));
        assert!(reset.last_word().unwrap().contains("rebooted"));
        assert_eq!(
            event("SHUTDOWN", json!({"reason": "new-one"}))
                .last_word()
                .unwrap(),
            "it shut down (new-one)"
        );
        assert_eq!(
            event("SHUTDOWN", Value::Null).last_word().unwrap(),
            "it shut down (no reason given)"
        );
        assert_eq!(event("STOP", Value::Null).last_word(), None);
    }
}
