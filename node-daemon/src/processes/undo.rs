//! Undoing a sequence of steps of which one fails.
//!
//! Each step names how it is undone before it is tried, because a step that fails may have had part of
//! its effect. So an undo must succeed also where its step has had none.

use std::fmt;

use anyhow::Result;

/// The undo actions of the steps that were begun; executed in reverse order when this is dropped, unless
/// [`Undo::keep`] was called. A failing undo is logged, and the others are executed all the same.
#[derive(Default)]
#[must_use = "the steps are undone when this is dropped"]
pub(crate) struct Undo<'a>(Vec<UndoStep<'a>>);

struct UndoStep<'a> {
    what: String,
    undo: Box<dyn FnOnce() -> Result<()> + 'a>,
}

impl<'a> Undo<'a> {
    /// Names the undo of a step that is about to be tried; `what` is for the log.
    pub(crate) fn before(
        &mut self,
        what: impl Into<String>,
        undo: impl FnOnce() -> Result<()> + 'a,
    ) {
        self.0.push(UndoStep {
            what: what.into(),
            undo: Box::new(undo),
        });
    }

    /// All steps have succeeded: nothing is undone.
    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        for UndoStep { what, undo } in self.0.drain(..).rev() {
            if let Err(error) = undo() {
                tracing::warn!(error = format!("{error:#}"), "a failed start: {what}");
            }
        }
    }
}

impl fmt::Debug for Undo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|step| &step.what))
            .finish()
    }
}
