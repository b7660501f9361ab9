//! The resets of a guest's machine.

use serde::{Deserialize, Serialize, Serializer};

/// The resets of a guest's machine in place. The state is [`super::VmState::Running`] meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetStatus {
    /// Resets since the guest was started, also on the nodes from which it has come.
    pub count: u32,
    /// The cause of the last one in this process. None on the wire for a panic, of which
    /// [`super::VmStatus::panics`] tells: earlier releases read no status with that cause.
    #[serde(serialize_with = "write_cause")]
    pub last: Option<ResetCause>,
    /// How long the machine waits before its next reset and why, for status messages: "it waits for ...".
    /// None when it does not wait.
    pub waits: Option<String>,
}

/// Why a machine is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResetCause {
    /// The guest requested it: a reboot.
    Guest,
    /// The guest caused a triple fault.
    TripleFault,
    /// [`super::Request::Reset`] was executed.
    Requested,
    /// The guest's kernel has panicked.
    Panic,
}

impl ResetCause {
    /// What has happened, as the begin of a sentence.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Guest => "the guest has reset itself",
            Self::TripleFault => "the guest has caused a triple fault",
            Self::Requested => "a reset was requested",
            Self::Panic => "the guest's kernel has panicked",
        }
    }
}

fn write_cause<S: Serializer>(last: &Option<ResetCause>, to: S) -> Result<S::Ok, S::Error> {
    last.filter(|cause| *cause != ResetCause::Panic)
        .serialize(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An earlier release refuses the whole status for a cause that it does not know.
    #[test]
    fn a_status_names_only_causes_that_earlier_releases_know() {
        let written = |last| {
            let status = ResetStatus {
                count: 1,
                last,
                waits: None,
            };
            serde_json::to_string(&status).unwrap()
        };
        let none = r#"{"count":1,"last":null,"waits":null}"#;
        assert_eq!(written(Some(ResetCause::Panic)), none);
        assert_eq!(written(None), none);
        for cause in ["Guest", "TripleFault", "Requested", "Panic"] {
            let text = none.replace("null,\"w", &format!("\"{cause}\",\"w"));
            let read: ResetStatus = serde_json::from_str(&text).unwrap();
            let expected = if cause == "Panic" {
                none
            } else {
                text.as_str()
            };
            assert_eq!(written(read.last), *expected);
        }
    }
}
