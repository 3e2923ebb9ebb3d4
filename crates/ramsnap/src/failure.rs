//! Errors of the tool itself.

mod formats;
mod images;
mod status;

use std::path::PathBuf;

use thiserror::Error;

use crate::print::count;
pub use formats::FormatFailure;
pub use images::ImagesFailure;

/// An error of the tool itself.
#[derive(Debug, Error)]
pub enum Failure {
    // Usage: change the command line. Nothing was written.
    #[error("{path:?} exists: name another file, or add --force to replace it")]
    OutputExists { path: PathBuf },
    #[error("the output {path:?} is one of the inputs: name another file")]
    OutputIsInput { path: PathBuf },
    #[error(
        "`-` would be stdout, to which only `convert --zstd` sends an image: name a file, or ./- for a file of that name"
    )]
    OutputIsStream,
    #[error(
        "{stream} is the file {path:?}, which is an input or output, and text would be written into it: \
         redirect {stream} to another file"
    )]
    StreamIsFile { stream: &'static str, path: PathBuf },
    #[error("{path:?} would replace one of its inputs: name another file, or say --in-place")]
    MergeOntoInput { path: PathBuf },
    #[error(
        "RAMSNAP_LOG is {value:?}, which names no events: set it to a level such as debug, or to directives such \
         as sparse_file=debug"
    )]
    EventFilter { value: String },
    #[error("`-` is a stream, which is always compressed: add --zstd")]
    StreamNotCompressed,
    #[error("--zstd is for streams: name `-` or a file that ends in .zst as input or output")]
    NoStream,
    #[error("a stream is packed: leave out --layout, or say --layout packed")]
    StreamLayout,
    #[error("the stream would go to the terminal: redirect it to a file or a pipe")]
    StreamToTerminal,
    #[error(
        "{path:?} is a raw image, and a raw image has no parent, id or metadata: choose --layout sealed or packed"
    )]
    RawHasNoSeal { path: PathBuf },
    #[error(
        "a diff in larger pages would need bytes that the diff does not hold: choose \
         a page size of at most {page_size}, or merge it first"
    )]
    DiffInLargerPages { page_size: u64 },
    #[error(
        "its pages have {page_size} bytes, as those of version 1 may, and an image is written in pages of 512 or more: \
         merge diffs with their full image, or if the size of the RAM is not a multiple of 512 \
         bytes, restore it into an existing file"
    )]
    OldPages { page_size: u64 },
    #[error(
        "{path:?} has more than 16 MiB: metadata is kept in memory, so store it in a file beside the image"
    )]
    TooMuchMetadata { path: PathBuf },
    #[error("the regions overlap, or do not ascend: give them by ascending address and apart")]
    RegionsOverlap,
    #[error(
        "a region starts at {start:#x}, which is not a multiple of the page size, 4 KiB: give its first address"
    )]
    RegionInsidePage { start: u64 },
    #[error(
        "the regions have {sum} bytes in all, the RAM has {ram_bytes}: give all of them, ascending and apart"
    )]
    NoLayout { ram_bytes: u64, sum: u128 },
    #[error(
        "the RAM does not fit the machine {machine}: {source}: name another machine, or the regions by --region-at"
    )]
    NotOfMachine {
        machine: &'static str,
        source: page_reader::LayoutError,
    },
    #[error("only `ramsnap convert` reads {path:?} as {}: convert it to an image first", .format.name())]
    OnlyConverted {
        path: PathBuf,
        format: vmm_files::Format,
    },
    #[error(
        "{path:?} is no image, and begins like a file of the format {name}, as the RAM of a guest may: if it is one, \
         name it as {name}:FILE",
        name = .format.name()
    )]
    FormatNotNamed {
        path: PathBuf,
        format: vmm_files::Format,
    },
    #[error(
        "{path:?} does not record the addresses of its RAM: name the machine by --guest, or the regions by --region-at"
    )]
    AddressesUnknown { path: PathBuf },
    #[error("no ELF core is of the processor of this host: name that of the guest by --machine")]
    NoElfMachine,
    #[error(
        "the RAM is at {regions}, where Firecracker has other regions: its guests cannot be restored from it"
    )]
    NotOfFirecracker { regions: String },
    #[error(
        "{path:?} exists, and a snapshot directory replaces nothing: name another one, or remove it"
    )]
    DirectoryExists { path: PathBuf },
    #[error("{path:?} is not a directory: name a directory")]
    NotADirectory { path: PathBuf },
    #[error(
        "{path:?} is not RAM: {size} bytes are not a whole number of pages; \
         if it is a sealed or packed image, or a file of another VMM, use `ramsnap convert`"
    )]
    RamIsImage { path: PathBuf, size: u64 },
    #[error(
        "{path:?} is sealed or packed, and records its own parent: leave out --raw-diff and --parent"
    )]
    NotARawDiff { path: PathBuf },
    #[error(
        "{path:?} is raw and has no id: seal it by `ramsnap convert`, with --id if it had one, or leave out --parent"
    )]
    ParentIsRaw { path: PathBuf },
    #[error("{path:?} is not raw and has an id, which the result keeps: leave out --id")]
    HasId { path: PathBuf },
    #[cfg(target_os = "linux")]
    #[error("--region is required for process {pid}; its largest mappings are:{proposed}")]
    NoRegion { pid: u32, proposed: String },
    #[cfg(target_os = "linux")]
    #[error(
        "--region {one} and --region {other} name the same memory, which would be saved twice: name each region once"
    )]
    RegionTwice { one: String, other: String },
    #[cfg(target_os = "linux")]
    #[error(
        "the old state has {old} bytes of RAM, and --region {region} of process {pid} has {new}: the kernel joins adjacent \
         mappings, so if the RAM is at the start of this one, give --region {proposed}"
    )]
    LargerRegion {
        pid: u32,
        region: String,
        proposed: String,
        old: u64,
        new: u64,
    },
    #[error("name the guest's RAM, once: its file, or a process by --pid")]
    NoRam,
    #[error(
        "the image's guest has its RAM at {regions}, and the image would not fit with other regions: leave out --region-at and \
         --guest"
    )]
    OtherRegionsGiven { regions: String },
    #[error(
        "{path:?} is raw, and no raw file says whether it is a full image or a diff on top of the old state: add \
         --raw-full or --raw-diff"
    )]
    RawNewState { path: PathBuf },
    #[error(
        "--raw-full and --raw-diff are for a new state whose first image is raw: leave them out"
    )]
    NoRawNewState,
    #[error(
        "name the new state, once: an image last, after the old one, or by --to; or RAM, by --ram or --pid"
    )]
    NoNewState,
    #[error(
        "a stream is a packed image, which records its own format and parent: \
         leave out --raw-diff, --parent, and any format but packed"
    )]
    StreamFormat,
    #[error(
        "{path:?} leads over the link {link:?}, which another user may have put there: name the file itself, or remove the link"
    )]
    ForeignLink { path: PathBuf, link: PathBuf },
    #[error(
        "{path:?} belongs to user {owner}, and others may access the RAM in it: name another file, make it \
         this user's and private (chown, chmod 600), or add --force"
    )]
    TargetNotPrivate { path: PathBuf, owner: u32 },
    #[error("{path:?} is not empty: add --force to overwrite it in place")]
    TargetInUse { path: PathBuf },
    #[error("the image has {image} bytes of RAM, {path:?} has {target}: they must be equal")]
    TargetSize {
        path: PathBuf,
        image: u64,
        target: u64,
    },
    #[error("{path:?} cannot be drawn in this format: name a file that ends in .svg or .png")]
    UnsupportedImageExtension { path: PathBuf },

    #[cfg(target_os = "linux")]
    #[error("name the socket to create by --socket: none was passed (LISTEN_FDS)")]
    NoSocket,
    #[cfg(target_os = "linux")]
    #[error("{path:?} exists and is not a socket: name another path")]
    NotASocket { path: PathBuf },

    #[error("both states have the id {id}: they are the same one; name two states")]
    SameState { id: memory_image::ImageId },

    // A check failed: name or send other files.
    #[error("the two states have {old} and {new} bytes of RAM: they are of different guests")]
    OtherGuest { old: u64, new: u64 },
    #[error(
        "the two states are of guests whose RAM is at other addresses: at {old}, and at {new}; name states of one guest"
    )]
    OtherRegions { old: String, new: String },
    #[error(
        "{path:?} is damaged in {}, which `ramsnap verify` lists: take it again, or go on with --no-verify",
        count(*found, "place")
    )]
    Damaged { path: PathBuf, found: u64 },
    #[error(
        "{path:?} is a raw image, which has no checksums: leave out --verify, or restore what `ramsnap convert` sealed"
    )]
    NothingToVerify { path: PathBuf },
    #[error("the stream is damaged in {}: send it again", count(*found, "place"))]
    StreamDamaged { found: u64 },
    #[error(
        "the stream is cut short, or not one that `ramsnap convert --zstd` wrote: send it again"
    )]
    StreamBroken,
    #[error(
        "the stream does not begin as a packed image of version 2 does: send one by `ramsnap convert FILE -o - --zstd`"
    )]
    StreamNotPacked,
    #[error(
        "the stream goes on after the {len} bytes of its image: send the image alone, by `ramsnap convert FILE -o - --zstd`"
    )]
    StreamTooLong { len: u64 },
    #[error("the stream ends after {received} bytes of an image of {len}: send it again")]
    StreamCut { received: u64, len: u64 },

    // Other failures: change what the message names, and try again.
    #[error(
        "stdout is closed or cannot be written: redirect it, or add --quiet to a verb that writes a file; nothing was done"
    )]
    NoStdout,
    #[error(
        "stdin is closed or cannot be read, and `-` reads a stream from it: redirect it; nothing was done"
    )]
    NoStdin,
    #[cfg(target_os = "linux")]
    #[error("another process listens on the socket {path:?}: end it, or name another path")]
    SocketInUse { path: PathBuf },
    #[cfg(target_os = "linux")]
    #[error(
        "what was passed (LISTEN_FDS) is not one listening Unix socket: give the socket unit one ListenStream= with a path"
    )]
    PassedSocket,
    #[error("{path:?} is empty: no guest has RAM of 0 bytes")]
    NoBytes { path: PathBuf },
    #[error(
        "{path:?} is not a regular file, memfd or block device: give the file that the guest's RAM is in"
    )]
    NotRam { path: PathBuf },
    #[error(
        "{path:?} changed its size from {before} to {now} bytes while it was read: \
         stop the program that resizes it, and try again"
    )]
    RamResized {
        path: PathBuf,
        before: u64,
        now: u64,
    },
    #[cfg(target_os = "linux")]
    #[error(
        "cannot open the file {name} behind the RAM of process {pid}, so a `ramsnap restore` that writes to it would not \
         be noticed: run ramsnap as root (CAP_CHECKPOINT_RESTORE), or if no restore is running, add --unknown-file"
    )]
    UnknownFile { pid: u32, name: String },
    #[cfg(target_os = "linux")]
    #[error("process {pid} has no memory that it can read and write: see /proc/{pid}/maps")]
    NothingLarge { pid: u32 },
    #[cfg(target_os = "linux")]
    #[error("process {pid} has nothing mapped at {address:#x}: see /proc/{pid}/maps")]
    NothingMapped { pid: u32, address: u64 },
    #[cfg(target_os = "linux")]
    #[error(
        "the mapping at {address:#x} of process {pid} may be a part of the RAM, because the mappings beside it are of \
         the same kind: give --region {whole} for all of them, or --region {part} for this one"
    )]
    PartOfRam {
        pid: u32,
        address: u64,
        part: String,
        whole: String,
    },
    #[cfg(target_os = "linux")]
    #[error(
        "the RAM of process {pid} was mapped elsewhere while the snapshot was prepared: try again"
    )]
    RamMoved { pid: u32 },
    #[error(
        "the file system {mount:?} ({file_system}) is full: {written} of {len} bytes of the stream were written in {dir:?}, and \
         {available} more are available; make room there, or name an output elsewhere"
    )]
    SpoolFull {
        dir: PathBuf,
        mount: PathBuf,
        file_system: String,
        written: u64,
        len: u64,
        available: u64,
        source: std::io::Error,
    },
    #[error(
        "a quota on the file system {mount:?} ({file_system}) is used up: {written} of {len} bytes of the stream were \
         written in {dir:?}; remove files that count for it, have it raised, or name an output elsewhere"
    )]
    SpoolOverQuota {
        dir: PathBuf,
        mount: PathBuf,
        file_system: String,
        written: u64,
        len: u64,
        source: std::io::Error,
    },
    #[error(
        "another `ramsnap restore` is writing to {path:?}, or a program has taken its lock ({by}): wait until it has ended, \
         or name another file; if it is not a ramsnap, end it; nothing was written"
    )]
    TargetBusy { path: PathBuf, by: String },
    #[cfg(target_os = "linux")]
    #[error(
        "another ramsnap is reading the RAM {path:?}, or a program has taken its lock ({by}): wait until it has ended, or \
         name another file; if it is not a ramsnap, {remedy}; nothing was written"
    )]
    TargetRead {
        path: PathBuf,
        by: String,
        remedy: String,
    },
    #[cfg(target_os = "linux")]
    #[error(
        "`ramsnap restore` is writing to {ram}, which is not complete yet, or a program has taken its lock ({by}): wait until \
         it has ended, and try again; if it is not a ramsnap, end it"
    )]
    RamBeingRestored { ram: String, by: String },
    #[error(
        "the work is done and in place, but the report of it cannot be written to stdout; it says: {report}"
    )]
    NotReported {
        report: String,
        source: std::io::Error,
    },
    #[error(
        "{path:?} changed its size while it was sent: keep programs from changing it, and send it again"
    )]
    SentResized { path: PathBuf },
    #[error(
        "cannot allocate {bytes} bytes of memory to restore the RAM in {path:?}: raise the limits of this process \
         (ulimit -d, ulimit -v); the RAM is as it was"
    )]
    NoMemory { path: PathBuf, bytes: u64 },
    #[error(
        "cannot allocate {bytes} bytes of memory to write {path:?}: raise the limits of this process (ulimit -d, \
         ulimit -v); nothing was written"
    )]
    NoMemoryForOutput { path: PathBuf, bytes: u64 },
    #[error(
        "cannot allocate {bytes} bytes of memory to read the files: raise the limits of this process (ulimit -d, \
         ulimit -v); nothing was written"
    )]
    NoMemoryToRead { bytes: u64 },
    #[error(
        "{path:?} was replaced, resized or written to while RAM was restored to it: \
         stop the program that does so, and restore again"
    )]
    TargetReplaced { path: PathBuf },
    #[error(
        "the RAM needs {needed} bytes of {path:?}, and {available} are available: make room on its file system; \
         nothing was written"
    )]
    NoRoom {
        path: PathBuf,
        needed: u64,
        available: u64,
    },
    #[error(
        "File too large: the RAM needs {needed} bytes of {path:?}, and this process may make no file longer than {limit} \
         (RLIMIT_FSIZE): raise the limit (ulimit -f); nothing was written"
    )]
    FileLimit {
        path: PathBuf,
        needed: u64,
        limit: u64,
    },
    #[cfg(target_os = "linux")]
    #[error(
        "the RAM needs {needed} bytes of {path:?}, and the file system cannot reserve them: {available} are available, and \
         blocks of the old RAM are reused only where the new RAM has data too; free space there, or restore to a new file; \
         nothing was written"
    )]
    NoRoomOver {
        path: PathBuf,
        needed: u64,
        available: u64,
    },
    #[error(
        "cannot open {path:?} to restore to: it belongs to user {owner}, and the system refuses this user: run ramsnap as \
         user {owner}, or as root outside of containers, or restore to a file of this user"
    )]
    TargetDenied {
        path: PathBuf,
        owner: u32,
        source: std::io::Error,
    },
    #[error("cannot write {path:?}, which is unchanged")]
    TargetNotWritable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path:?} is on hugetlbfs, which has no write(2): name an output on another file system; only `ramsnap restore` \
         writes there, to a file that exists and has the size of the RAM"
    )]
    NoWritesThere { path: PathBuf },
    #[cfg(target_os = "linux")]
    #[error(
        "there are not enough huge pages for {path:?}, which is unchanged: raise vm.nr_hugepages, or the size of \
         its hugetlbfs"
    )]
    NoHugePages {
        path: PathBuf,
        source: std::io::Error,
    },

    // A signal.
    #[error("interrupted: {left}")]
    Interrupted { left: &'static str },
}
