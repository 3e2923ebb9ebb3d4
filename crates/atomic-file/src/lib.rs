//! Replace files atomically and durably, one or several at once.
//!
//! At every instant the destination is the old file whole or the new file whole. Once
//! [`commit`](AtomicWriter::commit) has returned `Ok` it is the new one, after a power loss too. An error says
//! which of the two it is, or that this can't be known, and names whatever else is left in the directory.
//!
//! # Examples
//!
//! Replace a file:
//! ```
//! use std::io::Write;
//! use atomic_file::AtomicWriter;
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("vm.state");
//!
//! let mut writer = AtomicWriter::open(&dest)?;
//! writer.write_all(b"registers")?;
//! writer.commit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Write at offsets, from several threads, and choose what else there is to choose:
//! ```
//! use atomic_file::{AtomicWriter, Durability};
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("vm.mem");
//!
//! let writer = AtomicWriter::options().mode(0o640).durability(Durability::Barrier).open(&dest)?;
//! writer.file().set_len(1 << 20)?;
//! std::thread::scope(|scope| {
//!     let halves = [0, 1 << 19].map(|at| scope.spawn({
//!         let writer = &writer;
//!         move || writer.write_all_at(&[7; 4096], at)
//!     }));
//!     halves.into_iter().try_for_each(|half| half.join().expect("no panic"))
//! })?;
//! writer.commit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Tell apart what a failed commit means:
//! ```
//! use atomic_file::{AtomicWriter, CommitError};
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("vm.mem");
//!
//! match AtomicWriter::open(&dest)?.commit() {
//!     Ok(()) => println!("new, durable"),
//!     Err(CommitError::NotReplaced { .. }) => println!("still the old one; write again"),
//!     Err(CommitError::ReplacedDurabilityUnknown { .. }) => println!("new, but maybe not after a power loss"),
//!     Err(other) => return Err(other.into()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Replace files that belong together: see [`AtomicGroup`]. On start-up, finish what a crash interrupted and
//! remove what it left: see [`recover`] and [`sweep`].
//!
//! # How it works, as system calls
//!
//! What `open`, two writes and a commit do on Linux:
//! ```text
//! openat(AT_FDCWD, "vm", O_DIRECTORY|O_CLOEXEC)     = 3   held: all below is relative to it
//! newfstatat(3, "vm.mem", AT_SYMLINK_NOFOLLOW)            a file, or nothing; a link is followed by hand
//! newfstatat(3, ".atomic-file-group")               ENOENT: no group commit was interrupted here
//! newfstatat(3, ".atomic-file-2670fefa.spare")      ENOENT: nobody recycles here
//! openat(3, ".atomic-file-2670fefa-0.stage", O_RDWR|O_CREAT|O_EXCL|O_NOFOLLOW|O_CLOEXEC, 0600) = 4
//! flock(4, LOCK_EX|LOCK_NB)                               its owner lives
//! newfstatat(3, ".atomic-file-2670fefa-0.stage")          and is not taken for dead before it locked
//! pwrite64(4, ...) ...
//! fsync(4)                                                the bytes, then
//! newfstatat(3, ".atomic-file-2670fefa-0.stage")          is it still ours?
//! newfstatat(3, ".atomic-file-group")               ENOENT
//! renameat(3, ".atomic-file-2670fefa-0.stage", 3, "vm.mem")
//! flock(4, LOCK_UN)                                       also for a child that another thread has just forked
//! fsync(3)                                                the name
//! ```
//! On macOS the syncs are `fcntl(F_FULLFSYNC)`, as `fsync` there leaves the bytes in the drive's cache. Where a file
//! system has no such call (`ENOTTY`, `ENOTSUP`, `EINVAL`, and no other error) it is `fsync`.
//!
//! A call interrupted by a signal (`EINTR`) is made again. A *failed* sync never is: the kernel may have dropped the pages it
//! could not write, and a second sync would call that success. After any error of the rename the destination is compared with
//! the staged file (device, inode, size), as a network file system may lose the answer to a rename that happened.
//!
//! ## Stages, the living and the dead
//!
//! A stage's name is short whatever the destination's (255 bytes fit), and plain ASCII. Its writer holds a `flock` on it,
//! which goes when the process does, however it ends. So whoever finds a stage can tell a leftover from a file being
//! written by trying to lock it, between threads, processes, and NFS clients. A writer to the same destination looks at
//! the leftovers on its way, because it would trip over their names anyway, and removes them; so they do not
//! pile up, and the space of a half-written dump comes back when it is needed, without a list of the directory.
//! Other destinations' leftovers are for [`sweep`] to find. The protocol is written down in the source, `src/stage.rs`.
//!
//! Where a file system has no such locks (an NFS mount without its daemon), stages get another name, and nobody ever
//! removes one but its own writer.
//!
//! ## Recycling
//!
//! With [`Options::recycle`] `open` takes the file that the commit before last had written, if it is there and nobody
//! has it, and the commit keeps the file that it replaces:
//! ```text
//! openat(3, ".atomic-file-2670fefa.spare", O_RDWR|O_NOFOLLOW|O_CLOEXEC) = 4
//! flock(4, LOCK_EX|LOCK_NB)                               no other taker; then, is it still what the name means?
//! fstat(4), fstatfs(4), flistxattr(4)                     one name, our own, no attributes, on a file system that counts openers
//! fchmod(4, 0600)                                         from here on nobody can open it who might not open the new file,
//! fcntl(4, F_SETLEASE, F_WRLCK), F_UNLCK                  and nobody has it open, or mapped, who could before
//! renameat2(3, ".atomic-file-2670fefa.spare", 3, ".atomic-file-2670fefa-0.stage", RENAME_NOREPLACE)
//! pwrite64(4, ...) ...
//! fsync(4)
//! openat(3, "vm.mem", O_RDONLY|O_NOFOLLOW|O_CLOEXEC) = 5  the old file, locked and looked at in the same way
//! renameat2(3, ".atomic-file-2670fefa-0.stage", 3, "vm.mem", RENAME_EXCHANGE)
//! fsync(3)                                                the old file will never be "vm.mem" again
//! fchmod(5, 0600); fcntl(5, F_SETLEASE, F_WRLCK), F_UNLCK somebody has it: then it is removed
//! renameat2(3, ".atomic-file-2670fefa-0.stage", 3, ".atomic-file-2670fefa.spare", RENAME_NOREPLACE)
//! ```
//! The spare's name is a promise: it is given only after the sync of the directory, so whoever finds a file there, in whatever
//! process and after whatever crash, may overwrite it at once. Under a stage's name the old file is a dead stage, and removed like one.
//! The protocol is written down in the source, `src/spare.rs`.
//!
//! ## Groups
//!
//! [`AtomicGroup::commit`] does this; `S` is a sync of the directory:
//!
//! 1. syncs every stage, and writes and syncs the record: the stages' names, inode numbers and sizes, the destinations'
//!    names, a CRC-32; `S`, so that no record survives that names a stage which does not;
//! 2. renames the record to `.atomic-file-group` without replacing (there is one per directory: groups take turns); `S`. **This
//!    is the commit point**: before it a crash means all old, after it all new;
//! 3. renames every stage to its destination; `S`;
//! 4. removes the record; `S`, so that it never comes back to a directory that has moved on.
//!
//! Its owner holds the record's lock until the end. A record whose lock is free belongs to the dead, and whoever opens or
//! commits a file in the directory goes on at step 3; while somebody does, a commit of one of the group's destinations waits.
//! Before it renames anything it looks at every member: the destination is
//! the recorded inode (done), or the stage is (to do), or the stage is gone (done, and replaced by somebody since).
//! A stage that is another file now stops it, and so does a record that is not whole: nothing is guessed at.
//! Sweepers spare every stage while a record stands.
//!
//! # What may be on the medium after a crash
//!
//! Assumed of the file system and the medium:
//! - what was synced successfully stays, and reads back as it was written;
//! - a rename is atomic: after a crash each of the two names is what it was before or what it was after, and the
//!   destination's name never means nothing, if it meant something before;
//! - nothing is assumed of the order in which anything not synced gets there: writes, names, and lengths may each
//!   arrive or not, whole or torn.
//!
//! A killed process is the simpler case: the kernel keeps everything it did, in order.
//!
//! | crash after | [`Full`](Durability::Full): the destination is | left in the directory |
//! |---|---|---|
//! | `open`, writes | old | the stage, perhaps, with anything in it |
//! | sync of the file | old | the stage, perhaps, whole |
//! | rename | old or new, whole | the stage if old |
//! | sync of the directory: `commit` returns | **new** | nothing |
//!
//! With [`Options::recycle`] the rename is an exchange, so that after it the old file may be found under the stage's name; and once
//! the directory is synced, as the spare. Both are known to [`sweep`] and to the next writer.
//!
//! With [`Barrier`](Durability::Barrier) the commit ends one row earlier; with [`None`](Durability::None) neither sync takes
//! place, and after a power loss (not after a kill) the destination may be empty or torn.
//!
//! | crash in a group's | the destinations are | after recovery |
//! |---|---|---|
//! | step 1 | old | old; stages swept |
//! | step 2 | old | old, or new if the record got there |
//! | step 3, 4 | each old or new, whole | **new** |
//! | after `commit` returned | **new** | |
//!
//! # Limitations
//!
//! - What is replaced is the *name*. Other hard links to the old file keep it, and a process that has it open goes on reading
//!   it. The new file has the mode asked for and the owner of a file newly created; ACLs and extended attributes are not copied.
//! - A `fork`ed child that does not `exec` holds the locks on where its parent is killed, and runs destructors if it unwinds: let
//!   it `_exit`.
//! - Locks are advisory, and names are only names: somebody else who may write to the directory can remove or exchange a
//!   stage. The commit notices when the stage is not its own file any more; it cannot notice in the instant of the rename.
//! - A directory that may be written to but not read cannot be synced, nor opened here.
//! - Groups need locks, and inode numbers that outlive a mount: FAT, exFAT and FUSE file systems are
//!   [refused](Refusal). A file system that cannot sync a directory reports so at every commit with
//!   [`Full`](Durability::Full); choose a weaker durability there.
//! - A lease cannot tell of one who, in the middle of `open(2)`, has looked the destination's name up and not opened the file
//!   yet, and stays there from before one recycling commit until the next writer has taken the spare; of an NFS client that was
//!   given the file by this machine; of what `sendfile` and `splice` have under way. These may see new bytes in the old file.
//! - Readers see a group's files change one after another.
//!
//! # Features
//!
//! None. Unix only; made for Linux and macOS.

mod destination;
mod directory;
mod error;
mod group;
mod options;
mod outcome;
mod preserve;
mod record;
mod recover;
mod rehearsal;
mod spare;
mod stage;
mod sweep;
mod sys;
mod turn;
mod writer;

pub use error::{
    AddError, CommitError, CommitStep, GroupCommitError, Leftover, Obstacle, OpenError,
    RecoverError, Refusal, SweepError,
};
pub use group::AtomicGroup;
pub use options::{Durability, Options, Symlinks};
pub use preserve::{Attribute, NotPreserved, Preserve};
pub use recover::{RecoverReport, recover};
pub use sweep::{Kept, SweepReport, preview_sweep, sweep};
pub use writer::AtomicWriter;
