//! What the checks of a specification report.

/// A field with a value that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The field's path, for example `spec.disks[1].size`.
    pub field: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}
