//! The switch with which a test breaks one rule of the protocol, to show that the rule is needed.

/// The rules in force. A release enforces all; with the feature `fault-injection` a test may break one
/// and expect a counterexample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rules {
    #[cfg(feature = "fault-injection")]
    broken: Option<Mutation>,
}

impl Rules {
    /// Every rule in force.
    pub const ENFORCED: Self = Self {
        #[cfg(feature = "fault-injection")]
        broken: None,
    };

    /// Every rule in force but one.
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub const fn without(broken: Mutation) -> Self {
        Self {
            broken: Some(broken),
        }
    }

    /// Whether `mutation` is switched on, for a rule that the model itself has to break.
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub fn breaks(self, mutation: Mutation) -> bool {
        self.broken == Some(mutation)
    }
}

/// Whether the named mutation is switched on. Constant `false` in a release.
#[cfg(feature = "fault-injection")]
#[doc(hidden)]
#[macro_export]
macro_rules! broken {
    ($rules:expr, $mutation:ident) => {
        $rules.breaks($crate::Mutation::$mutation)
    };
}

/// Whether the named mutation is switched on. Constant `false` in a release.
#[cfg(not(feature = "fault-injection"))]
#[doc(hidden)]
#[macro_export]
macro_rules! broken {
    ($rules:expr, $mutation:ident) => {
        $rules != $crate::Rules::ENFORCED
    };
}

/// One way to break a rule.
#[cfg(feature = "fault-injection")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mutation {
    /// R1: the lease counts from the acknowledgement, not from before the submission.
    LeaseCountsFromAcknowledgement,
    /// R2: an acknowledgement that arrives after the expiry extends the lease.
    LateAcknowledgementExtends,
    /// R3: a slow renewal is sent again under the same sequence number.
    SequenceSentTwice,
    /// R3 across a restart: the next process counts on from the disk, not from the gate page.
    SequenceFromDisk,
    /// R4: a watcher's interval starts when the read is issued.
    IntervalFromIssue,
    /// R5: the completion of the confirming read counts, not its issue.
    ConfirmedAtCompletion,
    /// W: one lease, without allowance for clock drift.
    WatchWithoutDrift,
    /// A lease is renewed without re-reading the slot's records.
    RenewWithoutReread,
    /// A ballot is decided without the last read.
    DecideWithoutReread,
    /// A higher ballot does not end a lower one.
    IgnoreHigherBallot,
    /// A value that was accepted earlier is forgotten.
    ForgetAccepted,
    /// A Paxos block is written before the writes of an earlier life have settled.
    ReuseBeforeSettle,
    /// The next process does not know which writes of the one before it failed.
    ForgetFailedWrites,
    /// The old journal is read while the leader block is still being written.
    ReadJournalBeforeLeaderDurable,
    /// An answer follows the durable record at once.
    AnswerWithoutReread,
    /// A re-read counts that was issued before the record was durable.
    RereadIssuedEarly,
    /// A VM is taken over when the lease has ended, without the watchdog and settle times.
    TakeOverWithoutFence,
    /// The safe time lacks the settle time.
    SafeTimeWithoutSettle,
    /// The software watchdog counts as a hardware one.
    SoftwareWatchdogCounts,
    /// LeaseOnly takes over without a manual fencing confirmation.
    LeaseOnlyWithoutConfirmation,
    /// A manual fencing confirmation for one generation counts for a later one.
    ConfirmationForAnyGeneration,
    /// A fenced node's VMs go over to its next generation.
    RejoinKeepsFencedRows,
    /// A takeover does not raise the epoch.
    TakeOverKeepsEpoch,
    /// No rows are kept free for slots and fences.
    NoReservedRows,
    /// A node is confirmed as dead when it was not seen alive, by a node that may not have looked.
    UnseenCountsAsOver,
    /// Saved states are not bound to the ownership of the request, nor kept once they are complete.
    SavedStateUnbound,
    /// A reboot releases the VMs before the old boot's writes have settled.
    RebootClaimedBeforeSettle,
    /// The watchdog is petted although a lease has lapsed.
    PetWithoutLease,
    /// A watchdog counts though its timeout is too long for the volume's times.
    LongWatchdogTimeout,
    /// A watchdog's timeout counts once: a keepalive that comes late is forgotten.
    LateKeepaliveNotCounted,
    /// A restarted `bascule-watchdog` opens the device before it decides whether to pet.
    OpenBeforeDeciding,
    /// No second process holds the watchdog device open: the death of `bascule-watchdog` closes it.
    NoSecondHolder,
    /// A restarted `bascule-watchdog` sends a keepalive when it takes the open device over.
    KeepaliveOnAdoption,
    /// A restarted `bascule-watchdog` sets the timeout of the device that it takes over.
    TimeoutSetAgain,
    /// `bascule-watchdog` carries out a request that was decided before one that it has carried out.
    OutdatedRequestCounts,
    /// A volume is withdrawn from the watchdog while writes are in flight.
    WithdrawBeforeDrain,
    /// A volume whose lease has lapsed is withdrawn only when its writers have closed.
    WithdrawOnlyClosed,
    /// A volume whose lease has lapsed is withdrawn although a writer has a write in flight.
    WithdrawLapsedInFlight,
    /// A writer whose write failed counts as one that has nothing in flight.
    UncleanCountsAsDrained,
    /// A writer opens before the heartbeat says whether it is watched.
    OpenBeforePublished,
    /// A gate opens although the volume was withdrawn and not enlisted again.
    GateOpensBeforeEnlisting,
    /// A gate opens unwatched although the newest heartbeat record names a watchdog.
    UnwatchedWhileNamed,
    /// A transfer is not conditional on the epoch that the source owned.
    TransferIgnoresEpoch,
    /// A row does not record which migration attempt began its epoch.
    AttemptForgotten,
    /// The source resumes when a commit request gets no answer.
    ResumeOnNoAnswer,
    /// A feature is raised although not every joined node supports it.
    RaiseWithoutAsking,
    /// A feature is raised on the heartbeat of another generation than the one that has joined.
    OtherGenerationHasFeatures,
    /// A node joins although it does not support a feature that was raised.
    JoinWithoutFeatures,
    /// The source resumes on a refusal, although a copy of its request may still be decided.
    ResumeOnRefusal,
}
