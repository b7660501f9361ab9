//! How much of the guest's output the user has seen, over several connections.

/// The position of the next byte: how many the guest has written to its serial port since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position(Option<u64>);

/// What a new connection shows of the time since the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continuation {
    /// Everything, or it is the first connection.
    Whole,
    /// So many bytes are not kept any more.
    Lost(u64),
    /// The guest was started anew.
    Restarted,
}

impl Position {
    /// From where on output is to be asked for; none for the first connection.
    pub(crate) const fn wanted(self) -> Option<u64> {
        self.0
    }

    /// A connection begins at `position`.
    pub(crate) const fn begin(&mut self, position: u64) -> Continuation {
        let before = self.0.replace(position);
        match before {
            Some(before) if position > before => Continuation::Lost(position - before),
            Some(before) if position < before => Continuation::Restarted,
            _ => Continuation::Whole,
        }
    }

    /// So many bytes were shown.
    pub(crate) fn shown(&mut self, count: usize) {
        if let Some(position) = &mut self.0 {
            *position = position.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_goes_on_where_the_last_connection_ended() {
        let mut position = Position::default();
        assert_eq!(position.wanted(), None);
        assert_eq!(position.begin(1000), Continuation::Whole);
        position.shown(24);
        assert_eq!(position.wanted(), Some(1024));
        assert_eq!(position.begin(1024), Continuation::Whole);
        assert_eq!(position.begin(1030), Continuation::Lost(6));
        assert_eq!(position.begin(0), Continuation::Restarted);
        assert_eq!(position.wanted(), Some(0));
    }
}
