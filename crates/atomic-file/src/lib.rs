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
//! statx(3, ""), statx(3, "vm.mem")                        neither immutable, nor append-only, nor a mount point
//! openat(3, "."), getdents64                              no group commit was interrupted here, and no
//!                                                         staged file of "vm.mem" is left
//! newfstatat(3, ".atomic-file-2670fefa.spare")      ENOENT: no writer recycles here
//! openat(3, ".atomic-file-2670fefa-ebd32fc78d6c5729.stage", O_RDWR|O_CREAT|O_EXCL|O_NOFOLLOW|O_CLOEXEC, 0600) = 4
//! flock(4, LOCK_EX|LOCK_NB)                               its owner lives
//! newfstatat(3, ".atomic-file-2670fefa-….stage")          and was not taken for dead before it locked
//! fgetxattr(4, "system.posix_acl_access")                 which the directory may have it inherit: removed
//! openat(3, ".")                                          the commit will need as many descriptors
//! pwrite64(4, ...) ...
//! fsync(4)                                                the bytes; then, if another mode than 0600 was asked for,
//! fchmod(4, mode)                                         that, or what is to be preserved
//! fsync(4)                                                and once more
//! newfstatat(3, ".atomic-file-2670fefa-….stage")          is it still ours?
//! openat(3, "."), getdents64                              no group commit has "vm.mem"
//! renameat(3, ".atomic-file-2670fefa-….stage", 3, "vm.mem")
//! flock(4, LOCK_UN)                                       also for a child that another thread has just forked
//! openat(3, "."), getdents64                              nor was one published just before the rename
//! fsync(3)                                                the name
//! ```
//! On macOS the syncs are `fcntl(F_FULLFSYNC)`, as `fsync` there leaves the bytes in the drive's cache. Where a file
//! system has no such call (`ENOTTY`, `ENOTSUP`, `EINVAL`, and no other error) it is `fsync`.
//!
//! A call interrupted by a signal (`EINTR`) is made again. A *failed* sync never is: the kernel may have dropped the pages it
//! could not write, and a second sync would call that success. After any error of the rename the destination is compared with
//! the staged file (device, inode, size), as a network file system may lose the answer to a rename that happened.
//!
//! ## Detecting orphaned staged files
//!
//! A staged file's name is short for every destination (255 bytes fit), plain ASCII, and random,
//! so that no other user can occupy it. Its writer holds a `flock` on it, which goes when the process
//! does, however it ends. So a process that finds a staged file can distinguish an orphan from a file being written
//! by trying to lock it, between threads, processes, and NFS clients. The mode is 0600 until the
//! commit has synced the bytes, so that no other user can hold that lock. Then it gets its mode, and
//! its owner where that is preserved, and is synced again.
//!
//! A writer lists its directory when it is opened, and removes the orphans of its own destination:
//! those of this user, and those of the user whom the destination belongs to.
//! [`sweep`] removes those of all destinations. The protocol is written down in the source,
//! `src/stage.rs`.
//!
//! Where a file system has no such locks (an NFS mount without its daemon), staged files get another
//! name, and only their own writer removes them.
//!
//! ## What fails early
//!
//! [`Options::open`] refuses what is known to fail at the commit: a destination that is a directory, a
//! mount point, immutable, append-only or swap space in use; one that a sticky directory protects from this user; a
//! directory whose files cannot be renamed; attributes that cannot be preserved; a staging directory
//! that no rename leads out of; a file system without `no_clobber` where that is asked for.
//!
//! ## Recycling
//!
//! With [`Options::recycle`] `open` takes the file that the commit before last had written, if it is there and nobody
//! has it, and the commit keeps the file that it replaces:
//! ```text
//! openat(3, ".atomic-file-2670fefa.spare", O_RDWR|O_NOFOLLOW|O_CLOEXEC) = 4
//! flock(4, LOCK_EX|LOCK_NB)                               no other taker; then, is it still what the name means?
//! fstat(4), fstatfs(4), flistxattr(4)                     one name, our own, no attributes, on a file system that counts openers
//! openat(3, "."), getdents64                              no user's group is under way: see below
//! fchmod(4, 0600)                                         from here on nobody can open it who might not open the new file,
//! fcntl(4, F_SETLEASE, F_WRLCK), F_UNLCK                  and nobody has it open, or mapped, who could before
//! renameat2(3, ".atomic-file-2670fefa.spare", 3, ".atomic-file-2670fefa-….stage", RENAME_NOREPLACE)
//! pwrite64(4, ...) ...
//! fsync(4)
//! openat(3, "vm.mem", O_RDONLY|O_NOFOLLOW|O_CLOEXEC) = 5  the old file, locked and looked at in the same way
//! renameat2(3, ".atomic-file-2670fefa-….stage", 3, "vm.mem", RENAME_EXCHANGE)
//! fsync(3)                                                the old file will never be "vm.mem" again
//! fchmod(5, 0600); fcntl(5, F_SETLEASE, F_WRLCK), F_UNLCK somebody has it: then it is removed
//! renameat2(3, ".atomic-file-2670fefa-….stage", 3, ".atomic-file-2670fefa.spare", RENAME_NOREPLACE)
//! ```
//! The spare's name is a promise: it is given only after the sync of the directory, so whoever finds a file there, in whatever
//! process and after whatever crash, may overwrite it at once. Under a stage's name the old file is a dead stage, and removed like one.
//! The protocol is written down in the source, `src/spare.rs`.
//!
//! ## Groups
//!
//! [`AtomicGroup::commit`] does this; `S` is a sync of the directory:
//!
//! 1. syncs every staged file, waits while another group of this user over the same destinations is
//!    under way (`src/turn.rs`), and writes and syncs the record: the staged files' names, inode
//!    numbers and sizes, the destinations' names and what they are now, a CRC-32; `S`, so that no
//!    record survives that names a staged file which does not;
//! 2. renames the record to `.atomic-file-ID.group`; `S`. **This is the commit point**: before it a
//!    crash means all old, after it all new;
//! 3. renames every staged file to its destination; `S`;
//! 4. removes the record; `S`, so that it never comes back to a directory that has moved on.
//!
//! Its owner holds the record's lock until the end. A record whose lock is free belongs to a dead
//! process, and the next writer in the directory continues at step 3; while one
//! does, a commit of one of the group's destinations waits.
//!
//! **A recovery undoes no commit.** Before it renames anything it looks at every member. Where the
//! destination is the recorded inode, it is done. Where it is anything but what the record says was
//! there, by inode number and generation, a later commit replaced it, and that stays. Otherwise
//! the staged file is renamed. The generation is the time of creation, or where the file system keeps
//! none, a digest of the file's handle; where it has neither, groups are [refused](Refusal). A spare is
//! not taken while a group of any user is under way, as its generation stays what it was. A commit of a single file looks for records before its rename and
//! again after it, so that a recovery that looked before the rename has ended when the commit returns.
//!
//! **A record concerns its own members only.** One that cannot be completed (a staged file is another
//! file now, a destination is a directory) makes writers to its members fail, and no others, until
//! someone decides; [`recover`] reports it, completes all other groups, and sweeps. So it is where a
//! staged file is gone and its destination is still the recorded one: the group's other files are left
//! as they are. Where that is so of all its files, all are old, and the group is given up. A record that is
//! damaged is reported and ignored, and the staged files of its user are kept. A record that is torn,
//! as a power loss leaves it with [`Durability::None`], never got to its commit point and is removed.
//!
//! **A record is obeyed only if it is this user's**, or the directory's owner's where no one else may
//! write; others are ignored and never waited for. In a directory where others may write, it must
//! also have one name and be accessible to its owner alone. A record can only have files with a
//! staged file's name renamed within its directory.
//!
//! **No sweep removes what a record names**, of the staged files of the record's own user; and of all
//! users, where the record is root's or is obeyed. Root's staged files belong to another user from
//! the moment that a preserved owner is set. A process of another user that may give files away
//! commits them in no group unless its record is obeyed by all.
//!
//! Records of version 1, named `.atomic-file-group`, are still completed. They do not say what a
//! destination was, so a commit made since then cannot be distinguished from the file before the group.
//!
//! ## Replacing a file that was read
//!
//! The last writer to commit wins, whatever was there. A writer whose bytes were made from those of
//! the destination gives the [`FileVersion`] that it read to [`Options::replace_only`]. A commit of
//! another writer since then is noticed by `open` and by the commit, which replaces nothing:
//! ```text
//! fsync(4)
//! openat(3, "."), getdents64                              no group commit has "vm.mem"
//! flock(5, LOCK_EX|LOCK_NB)                               the file that was read: no other such writer replaces it now
//! newfstatat(3, "vm.mem")                                 is it that file, as it was?
//! renameat(3, ".atomic-file-2670fefa-….stage", 3, "vm.mem")
//! flock(5, LOCK_UN)
//! ```
//! Of several such writers that have read the same file, one replaces it (on file systems with locks). No system call compares and
//! renames in one step, and other writers do not take that lock: the commit of a writer *without*
//! `replace_only` between the last look and the rename, two system calls in a row, is replaced.
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
//!   it. The new file has the mode asked for and the owner of a file newly created, unless [`Options::preserve`] says otherwise.
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
//! - In a directory that does not distinguish upper and lower case, names of one file that differ in
//!   case (or in Unicode composition) are different destinations to all that waits or takes turns.
//! - Readers see a group's files change one after another.
//! - Groups of different users over the same destinations do not wait for each other, and may mix.
//! - Opening a writer lists the directory once, and committing lists it twice: keep snapshots out of
//!   directories of hundreds of thousands of files.
//! - A process of this user that is stopped in the middle of a group's commit holds up the commits of
//!   that group's own files, until it is continued or killed.
//!
//! # Features
//!
//! None. Unix only; made for Linux and macOS.

mod destination;
mod directory;
mod error;
mod group;
mod options;
mod permissions;
mod preflight;
mod preserve;
mod record;
mod recover;
mod recycle;
mod rename;
mod staged_file;
mod sweep;
mod sys;
mod ticket;
mod version;
mod writer;

pub use error::{
    AddError, CommitError, CommitStep, GroupCommitError, Leftover, Obstacle, OpenError,
    RecoverError, Refusal, SweepError,
};
pub use group::AtomicGroup;
pub use options::{Durability, Options, Symlinks};
pub use permissions::others_may_write;
pub use preserve::{Attribute, NotPreserved, Preserve};
pub use recover::{RecoverReport, recover};
pub use sweep::{Kept, SweepReport, preview_sweep, sweep};
pub use version::FileVersion;
pub use writer::AtomicWriter;
