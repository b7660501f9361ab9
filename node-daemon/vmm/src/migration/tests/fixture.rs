//! Both sides of a migration in this process, and the volume between them.

use super::*;

pub(super) const HERE: Owner = owner(1);
pub(super) const THERE: Owner = owner(2);
pub(super) const VM: VmUid = VmUid::from_bytes([1; 16]);

pub(super) const fn owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(1),
    }
}

/// The machine of one side.
pub(super) enum Owned {
    Running(RunningVm),
    Paused(PausedVm),
    Between,
}

pub(super) struct TestGuest {
    pub(super) vm: Owned,
    pub(super) in_doubt: bool,
    pub(super) announced: u32,
    pub(super) taken_over: Option<Epoch>,
    /// It ends by itself when it is about to be paused, as this text says.
    pub(super) ends: Option<&'static str>,
}

impl TestGuest {
    pub(super) fn new(vm: Owned) -> Self {
        Self {
            vm,
            in_doubt: false,
            announced: 0,
            taken_over: None,
            ends: None,
        }
    }

    pub(super) fn machine(&self) -> MachineHandle {
        match &self.vm {
            Owned::Running(vm) => vm.handle(),
            Owned::Paused(vm) => vm.handle(),
            Owned::Between => panic!("no machine"),
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.vm, Owned::Running(_))
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> GuestError {
    GuestError(error.to_string())
}

impl Guest for TestGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        if let Some(text) = self.ends {
            self.vm = Owned::Between;
            return Err(failed(text));
        }
        self.vm = match std::mem::replace(&mut self.vm, Owned::Between) {
            Owned::Running(vm) => Owned::Paused(vm.pause().map_err(failed)?),
            _ => panic!("paused twice"),
        };
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        let Owned::Paused(vm) = &self.vm else {
            panic!("saved while running");
        };
        vm.save().map_err(failed)?.encode().map_err(failed)
    }

    fn resume(&mut self, _ownership: Option<Ownership>) -> Result<(), GuestError> {
        self.vm = match std::mem::replace(&mut self.vm, Owned::Between) {
            Owned::Paused(vm) => Owned::Running(vm.run().map_err(failed)?),
            other => other,
        };
        Ok(())
    }

    fn mark_in_doubt(&mut self) -> Result<(), GuestError> {
        self.in_doubt = true;
        Ok(())
    }
}

impl Arrival for TestGuest {
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let Owned::Paused(vm) = &mut self.vm else {
            panic!("restored while running");
        };
        vm.restore(MachineState::decode(state).map_err(failed)?)
            .map_err(failed)
    }

    fn take_over(&mut self, ownership: Ownership) -> Result<(), GuestError> {
        self.taken_over = Some(ownership.epoch);
        Ok(())
    }

    fn announce(&mut self) {
        self.announced += 1;
    }

    fn run(&mut self) -> Result<(), GuestError> {
        assert!(self.announced > 0, "announced before the first instruction");
        self.resume(None)
    }
}

/// An ownership record, and the faults of its volume.
pub(super) struct Row {
    pub(super) seen: OwnershipRecord,
    /// Replies to be lost after the request was decided.
    pub(super) lost_answers: u32,
    /// Transfers to the destination are refused.
    pub(super) refuse: bool,
}

#[derive(Clone)]
pub(super) struct TestVolume(pub(super) Arc<Mutex<Row>>);

impl TestVolume {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Row {
            seen: OwnershipRecord {
                owner: Some(HERE),
                epoch: Epoch(4),
                attempt: None,
            },
            lost_answers: 0,
            refuse: false,
        })))
    }

    pub(super) fn seen(&self) -> OwnershipRecord {
        self.0.lock().unwrap().seen
    }
}

impl OwnershipAuthority for TestVolume {
    fn volume(&self) -> VolumeId {
        VolumeId::from_bytes([7; 16])
    }

    fn request(&mut self, request: &TransferRequest) -> Reply {
        let mut row = self.0.lock().unwrap();
        let (TransferRequest::Transfer(transfer) | TransferRequest::Retract(transfer)) = *request;
        let seen = row.seen;
        let done = seen.attempt == Some(transfer.attempt) && seen.epoch == transfer.epoch.next();
        let fits = seen.owner == Some(transfer.from) && seen.epoch == transfer.epoch;
        let allowed = !(row.refuse && transfer.to != transfer.from);
        if !done && fits && allowed {
            row.seen = OwnershipRecord {
                owner: Some(transfer.to),
                epoch: transfer.epoch.next(),
                attempt: Some(transfer.attempt),
            };
        }
        if row.lost_answers > 0 {
            row.lost_answers -= 1;
            return Reply::NoAnswer;
        }
        if done || (fits && allowed) {
            Reply::Granted(row.seen)
        } else {
            Reply::Refused(row.seen)
        }
    }

    fn record(&mut self) -> RecordAnswer {
        RecordAnswer::Record(self.seen())
    }
}

pub(super) fn certificates() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (authority, _) = bascule_pki::Authority::create("test").unwrap();
    let node = authority.issue_node(NodeUid::random()).unwrap();
    for (name, text) in [
        ("node.crt", node.certificate_pem.as_str()),
        ("node.key", node.key_pem.as_str()),
        ("ca.crt", authority.certificate_pem()),
    ] {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

pub(super) const LIMITS: MigrationLimits = MigrationLimits {
    // An interpreted guest on a busy machine.
    downtime_ms_max: 2_000,
    total_ms_max: 60_000,
    bytes_per_second_max: None,
};

/// An interface of the destination on a network with this MTU.
pub(super) fn interface(mtu: u16) -> Interface {
    Interface {
        bridge: "lan".to_owned(),
        mtu: Some(mtu),
    }
}

pub(super) type Populate = Box<dyn FnMut(*mut u8, usize) -> std::io::Result<()> + Send>;

/// One attempt, with the requests of both sides.
pub(super) struct Move {
    pub(super) outgoing: Outgoing,
    pub(super) incoming: Incoming,
    pub(super) volume: TestVolume,
    pub(super) source_control: Arc<MigrationControl>,
    pub(super) destination_control: Arc<MigrationControl>,
    /// What makes the destination's memory resident, in place of the kernel.
    pub(super) populate: Option<Populate>,
    _tls: tempfile::TempDir,
}

impl Move {
    pub(super) fn new() -> Self {
        let tls = certificates();
        let attempt = AttemptId::random();
        let description = b"test".to_vec();
        Self {
            outgoing: Outgoing {
                vm: VM,
                attempt,
                peer: SocketAddr::from(([127, 0, 0, 1], 0)),
                from: HERE,
                epoch: Epoch(4),
                to: THERE,
                limits: LIMITS,
                tls_dir: tls.path().to_owned(),
                cpus: 1,
                description: description.clone(),
                offered_mtus: vec![1500],
                faults: Faults::NONE,
            },
            incoming: Incoming {
                vm: VM,
                attempt,
                owner: THERE,
                tls_dir: tls.path().to_owned(),
                cpus: 1,
                description,
                interfaces: vec![interface(1500)],
                orphan_timeout: Duration::from_secs(20),
                faults: Faults::NONE,
            },
            volume: TestVolume::new(),
            source_control: Arc::new(MigrationControl::new(attempt)),
            destination_control: Arc::new(MigrationControl::new(attempt)),
            populate: None,
            _tls: tls,
        }
    }

    /// Starts the destination and points the source at it.
    pub(super) fn listen(
        &mut self,
        mut arrival: TestGuest,
    ) -> JoinHandle<(IncomingEnd, TestGuest)> {
        let local = self.outgoing.peer.ip();
        let listener = TcpListener::bind(SocketAddr::new(local, 0)).unwrap();
        self.outgoing.peer = listener.local_addr().unwrap();
        let (job, mut volume) = (self.incoming.clone(), self.volume.clone());
        let control = Arc::clone(&self.destination_control);
        let populate = self.populate.take();
        spawn("destination", move || {
            let memory = populate.map_or_else(
                || PrefaultedMemory::begin(&arrival.machine(), job.faults),
                |populate| PrefaultedMemory::with(&arrival.machine(), populate),
            );
            let end = receive_live(
                &listener,
                &mut arrival,
                &memory.unwrap(),
                &job,
                &mut volume,
                &control,
            );
            (end, arrival)
        })
    }

    pub(super) fn send(&self, guest: &mut TestGuest) -> OutgoingEnd {
        let machine = guest.machine();
        let mut volume = self.volume.clone();
        let control = &self.source_control;
        migrate_live(guest, machine, &self.outgoing, &mut volume, control)
    }

    pub(super) fn status(&self) -> MigrationStatus {
        self.source_control.status()
    }
}

pub(super) fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .unwrap()
}

pub(super) fn source() -> (TestGuest, TestVm) {
    let (builder, test) = TestVm::builder(1);
    let vm = builder.boot(images(COUNTER)).unwrap().run().unwrap();
    test.await_output(20);
    (TestGuest::new(Owned::Running(vm)), test)
}

pub(super) fn destination() -> (TestGuest, TestVm) {
    let (builder, test) = TestVm::builder(1);
    let vm = builder.incoming(images(COUNTER)).unwrap();
    (TestGuest::new(Owned::Paused(vm)), test)
}

/// The counter's letters go on in order.
pub(super) fn assert_uninterrupted(output: &[u8]) {
    for pair in output.windows(2) {
        let next = if pair[0] == b'p' { b'a' } else { pair[0] + 1 };
        assert_eq!(pair[1], next, "{}", String::from_utf8_lossy(output));
    }
}

pub(super) fn assert_goes_on(guest: &TestGuest, test: &TestVm) {
    assert!(guest.is_running());
    let now = test.written();
    test.await_output(now + 20);
}
