//! Every string that users, scripts and alerts see and may rely on: condition types and reasons,
//! event reasons, labels, annotations, finalizers, the field manager. Each exists once, here.

/// The API group of all kinds.
pub const GROUP: &str = "bascule.dev";
/// The API version of all kinds.
pub const VERSION: &str = "v1alpha1";
/// The API group of the subresources that the operator serves itself, behind the API server.
pub const SUBRESOURCES_GROUP: &str = "subresources.bascule.dev";
/// The name under which the operator owns fields in server-side apply.
pub const FIELD_MANAGER: &str = "bascule-operator";
/// Kept on a VirtualMachine until its guest has ended and its row is deleted from the volume.
pub const VM_FINALIZER: &str = "bascule.dev/virtual-machine";
/// Kept on a SharedVolume until no VirtualMachine lives on it.
pub const VOLUME_FINALIZER: &str = "bascule.dev/shared-volume";
/// The audience of the token with which a node joins.
pub const JOIN_AUDIENCE: &str = "bascule.dev";

/// Label: the name of the VirtualMachine that a pod, migration or failover belongs to.
pub const LABEL_VM: &str = "bascule.dev/virtual-machine";
/// Label on pods: what it is there for. Value [`ROLE_RESERVATION`].
pub const LABEL_ROLE: &str = "bascule.dev/role";
/// A pod that holds a VM's CPU and memory in the scheduler.
pub const ROLE_RESERVATION: &str = "reservation";
/// Label on a reservation pod: `current` where the VM runs, `migration` where it is going to.
pub const LABEL_PURPOSE: &str = "bascule.dev/purpose";
/// Label on a migration: what created it, `drain` or nothing.
pub const LABEL_TRIGGER: &str = "bascule.dev/trigger";
/// A migration that was created because a reservation pod was evicted.
pub const TRIGGER_DRAIN: &str = "drain";
/// Annotation on a SharedVolume: a manual fencing confirmation that a node is dead, written as
/// `<node>/<slot>/<generation>`, as the Failover that waits for it names them.
pub const ANNOTATION_CONFIRM_FENCED: &str = "bascule.dev/confirm-fenced";

/// Condition types.
pub mod condition {
    /// The summary: the object is in the state that its spec requires.
    pub const READY: &str = "Ready";
    /// The VM would survive the loss of its node.
    pub const PROTECTED: &str = "Protected";
    /// Disks, kernel and initrd are on the volume, complete and verified.
    pub const IMPORTED: &str = "Imported";
    /// The spec has changed since the guest was started; the change waits for the next start.
    pub const RESTART_REQUIRED: &str = "RestartRequired";
    /// Another virtual machine has the same MAC address on the same network. Only there while it has.
    pub const MAC_CONFLICT: &str = "MacConflict";
    /// The agent in the guest answers. Only there if spec.guestAgent asks for one.
    pub const GUEST_AGENT: &str = "GuestAgent";
    /// A migration or failover has come to an end.
    pub const COMPLETE: &str = "Complete";
    /// The fencing mode of the spec is in force.
    pub const FENCING_AVAILABLE: &str = "FencingAvailable";
}

/// Reasons of conditions and events. Stable: scripts and alerts may rely on them.
pub mod reason {
    /// The guest runs.
    pub const RUNNING: &str = "Running";
    /// The guest is stopped, as the spec requires.
    pub const STOPPED: &str = "Stopped";
    /// The guest is about to start.
    pub const STARTING: &str = "Starting";
    /// The guest was told to shut down; it has not done so yet.
    pub const STOPPING: &str = "Stopping";
    /// Disks, kernel or initrd are being copied to the volume.
    pub const IMPORTING: &str = "Importing";
    /// Everything is on the volume.
    pub const IMPORTED: &str = "Imported";
    /// A source could not be fetched or failed its check.
    pub const IMPORT_FAILED: &str = "ImportFailed";
    /// An image has a format, a length or a CPU that is not supported. It is not fetched again.
    pub const IMAGE_REFUSED: &str = "ImageRefused";
    /// No node has room for the VM, or none fits its placement.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// A quota or limit range of the namespace does not let the reservation pod be created.
    pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";
    /// The API server refused the reservation pod, for the reason in the message.
    pub const RESERVATION_REFUSED: &str = "ReservationRefused";
    /// Another virtual machine has the same MAC address on the same network.
    pub const DUPLICATE_MAC: &str = "DuplicateMac";
    /// The reservation pod waits for the scheduler.
    pub const SCHEDULING: &str = "Scheduling";
    /// The SharedVolume does not exist.
    pub const VOLUME_MISSING: &str = "VolumeMissing";
    /// The SharedVolume is not usable on the node.
    pub const VOLUME_UNAVAILABLE: &str = "VolumeUnavailable";
    /// The volume has no room.
    pub const VOLUME_FULL: &str = "VolumeFull";
    /// A disk is claimed by another VM.
    pub const DISK_CLAIMED: &str = "DiskClaimed";
    /// The volume refused a request, for the reason in the message.
    pub const VOLUME_REFUSED: &str = "VolumeRefused";
    /// A Secret that the spec refers to does not exist, lacks the key, or may not be read by the operator.
    pub const SECRET_UNAVAILABLE: &str = "SecretUnavailable";
    /// The guest could not be started, for the reason in the message.
    pub const START_FAILED: &str = "StartFailed";
    /// The guest ended without a request to stop.
    pub const GUEST_FAILED: &str = "GuestFailed";
    /// The memory that a quick migration had saved could not be used any more.
    pub const SAVED_STATE_OUTDATED: &str = "SavedStateOutdated";
    /// The guest shut itself down.
    pub const GUEST_SHUT_DOWN: &str = "GuestShutDown";
    /// Restarted too often; waiting before the next attempt.
    pub const BACKING_OFF: &str = "BackingOff";
    /// The restart budget is used up.
    pub const RESTARTS_EXHAUSTED: &str = "RestartsExhausted";
    /// The guest is moving to another node.
    pub const MIGRATING: &str = "Migrating";
    /// The node that owns the VM does not respond on the network; the guest may well be running.
    pub const NODE_UNREACHABLE: &str = "NodeUnreachable";
    /// The node responds neither on the network nor on the volume; a takeover needs a fence proof.
    pub const NODE_SUSPECT: &str = "NodeSuspect";
    /// The volume waits for a manual fencing confirmation that the node is dead.
    pub const WAITING_FOR_CONFIRMATION: &str = "WaitingForConfirmation";
    /// The node's guests lost their storage path and wait.
    pub const STORAGE_LOST: &str = "StorageLost";
    /// The guest is paused because one of its disks failed, and the disk's onError is Pause.
    pub const DISK_ERROR: &str = "DiskError";
    /// The guest resets itself again and again, and waits before its next reset.
    pub const GUEST_RESETS: &str = "GuestResets";
    /// The guest's kernel has panicked.
    pub const GUEST_PANICKED: &str = "GuestPanicked";
    /// The VM is being deleted.
    pub const DELETING: &str = "Deleting";
    /// The spec cannot be carried out, for the reason in the message.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// The agent in the guest answers.
    pub const CONNECTED: &str = "Connected";
    /// No agent in the guest has opened its port: none runs, or the guest is still booting.
    pub const NOT_CONNECTED: &str = "NotConnected";
    /// The agent in the guest has its port open, and does not answer.
    pub const NOT_RESPONDING: &str = "NotResponding";
    /// The spec has changed since the guest was started.
    pub const SPEC_CHANGED: &str = "SpecChanged";
    /// The guest runs as its spec says.
    pub const UP_TO_DATE: &str = "UpToDate";
    /// Nothing is known yet.
    pub const UNKNOWN: &str = "Unknown";

    /// Protected: its node's loss leads to a restart elsewhere.
    pub const PROTECTED: &str = "Protected";
    /// Not protected: the VM does not run.
    pub const NOT_RUNNING: &str = "NotRunning";
    /// Not protected: `availability.onNodeFailure` is Leave.
    pub const POLICY_LEAVE: &str = "PolicyLeave";
    /// Not protected: the volume's fencing needs a manual fencing confirmation.
    pub const FENCING_MANUAL: &str = "FencingManual";
    /// Not protected: the node has no hardware watchdog.
    pub const NO_WATCHDOG: &str = "NoWatchdog";
    /// Not protected: the volume is a file.
    pub const FILE_BACKING: &str = "FileBacking";
    /// Not protected: no other node has a direct path to the volume.
    pub const NO_OTHER_NODE: &str = "NoOtherNode";

    /// The fencing mode is declared in the API and does not exist yet.
    pub const FENCING_NOT_IMPLEMENTED: &str = "FencingNotImplemented";
    /// The fencing mode of the spec is in force.
    pub const FENCING_IN_FORCE: &str = "FencingInForce";
    /// At least one node has the volume attached.
    pub const ATTACHED: &str = "Attached";
    /// No node has the volume attached.
    pub const NOT_ATTACHED: &str = "NotAttached";
    /// The volume is not formatted, and `initialize` is Never.
    pub const NOT_FORMATTED: &str = "NotFormatted";
    /// The device holds something, and no volume that can be used here was found on it.
    pub const NOT_BLANK: &str = "NotBlank";
    /// The volume is being formatted.
    pub const FORMATTING: &str = "Formatting";
    /// VirtualMachines still have their disks on the volume.
    pub const IN_USE: &str = "InUse";

    /// A migration waits for the scheduler to find a target.
    pub const PLACING: &str = "Placing";
    /// A migration or failover is under way.
    pub const IN_PROGRESS: &str = "InProgress";
    /// A migration or failover reached its goal.
    pub const SUCCEEDED: &str = "Succeeded";
    /// A migration failed; the guest runs where it was.
    pub const FAILED: &str = "Failed";
    /// A migration was cancelled; the guest runs where it was.
    pub const CANCELLED: &str = "Cancelled";
    /// A migration was refused: the VM is not running.
    pub const VM_NOT_RUNNING: &str = "VirtualMachineNotRunning";
    /// A migration was refused: there is no such VM.
    pub const VM_NOT_FOUND: &str = "VirtualMachineNotFound";
    /// A migration was refused: the VM is on the target already.
    pub const TARGET_IS_SOURCE: &str = "TargetIsSource";
    /// A migration was refused: there is no such node, or it runs no bascule-node.
    pub const TARGET_UNKNOWN: &str = "TargetUnknown";
    /// A migration was refused: the target is cordoned.
    pub const TARGET_CORDONED: &str = "TargetCordoned";
    /// A migration was refused: another one of the same VM is under way.
    pub const ANOTHER_MIGRATION_RUNS: &str = "AnotherMigrationRuns";
    /// A migration found no node within its time limit.
    pub const NO_TARGET: &str = "NoTarget";
    /// A migration did not end within its time limit.
    pub const TIMED_OUT: &str = "TimedOut";
    /// A live migration was given up: the guest changes its memory faster than it can be copied
    /// within the limits.
    pub const NOT_CONVERGING: &str = "NotConverging";
    /// The VM was deleted or stopped in the meantime.
    pub const SUPERSEDED: &str = "Superseded";
    /// The suspected node came back before it was proved dead.
    pub const NODE_RETURNED: &str = "NodeReturned";
    /// A takeover was granted.
    pub const TAKEN_OVER: &str = "TakenOver";
    /// A pod claims to be a reservation of the virtual machine, and the operator did not make it. It is deleted.
    pub const FOREIGN_RESERVATION: &str = "ForeignReservation";
    /// A reservation pod was lost and made again.
    pub const RESERVATION_LOST: &str = "ReservationLost";
    /// Event on a Node: no guest can run there, for the reason in the message.
    pub const KVM_UNAVAILABLE: &str = "KvmUnavailable";
    /// Event on a Node: guests can run there again.
    pub const KVM_AVAILABLE: &str = "KvmAvailable";
    /// The volume records a virtual machine that no VirtualMachine object names.
    pub const UNCLAIMED_VIRTUAL_MACHINE: &str = "UnclaimedVirtualMachine";
}
