//! Measures the part of the blackout that does not depend on how much memory is dirty.

use std::time::Instant;

use bascule_migrate::Frame;
use bascule_migrate::precopy::FixedCost;
use bascule_migrate::wire::Abort;
use bascule_types::Bytes;

use super::{Driver, internal};
use crate::migration::channel::lost_frame;

impl Driver<'_> {
    /// After round `round`, before the decision that follows it.
    pub(super) fn measure_fixed_cost(&mut self, round: u32) -> Result<(), Abort> {
        let measured = self.dry_run()?;
        if round == 1 {
            self.fixed = measured;
        } else {
            self.fixed.improve(&measured);
        }
        tracing::info!(?measured, fixed = ?self.fixed, "fixed cost of the blackout");
        Ok(())
    }

    /// Measures what does not depend on memory: stops and saves the guest once and lets it go on.
    fn dry_run(&mut self) -> Result<FixedCost, Abort> {
        let requested = Instant::now();
        self.authority.record();
        // A transfer is a journaled write and two such reads.
        let commit = requested.elapsed() * 2;
        let began = Instant::now();
        self.pause()?;
        let saved = self.save();
        self.guest.resume(None).map_err(|error| internal(error.0))?;
        let save = began.elapsed();
        let state = Bytes(saved?.len() as u64);
        let token = 1;
        let pinged = Instant::now();
        self.send(&Frame::Ping { token })?;
        let channel = self.channel()?;
        match channel.receive().map_err(|error| lost_frame(&error))? {
            Frame::Pong { token: 1 } => {}
            Frame::Abort(abort) => return Err(abort),
            other => return Err(internal(format!("{:?} instead of Pong", other.kind()))),
        }
        Ok(FixedCost {
            save,
            restore: self.fixed.restore,
            commit,
            round_trip: pinged.elapsed(),
            state,
        })
    }
}
