//! Failures that the same source meets again, so that it is not fetched again.

/// What is refused for good, in this process or in one that works for it; the text is its message.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct FinalFailure(pub(crate) String);

/// Whether the same source would fail again.
pub(crate) fn is_final(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.is::<bascule_image::Refusal>() || cause.is::<FinalFailure>())
}

/// The exit status of a process that failed for good.
pub(crate) const FINAL_STATUS: u8 = 3;
