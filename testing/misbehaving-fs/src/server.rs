//! The FUSE server: one directory of regular files.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};
use nix::fcntl::{AT_FDCWD, FallocateFlags, fallocate, renameat2};
use nix::unistd::{Whence, lseek};

use crate::behavior::{Behavior, Lseek, Reads};

/// The kernel does not cache names and attributes.
const TTL: Duration = Duration::ZERO;
/// The maximum number of bytes in a short read.
const SHORT_READ: usize = 1000;

pub(crate) struct Server {
    dir: PathBuf,
    behavior: Arc<Mutex<Behavior>>,
    writeback_cache: bool,
    root: u64,
    /// Open files by inode number, kept until unmount, even without a name.
    files: Mutex<HashMap<u64, Arc<File>>>,
}

impl Server {
    pub(crate) fn new(
        dir: &Path,
        behavior: Arc<Mutex<Behavior>>,
        writeback_cache: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            root: dir.metadata()?.ino(),
            dir: dir.to_owned(),
            behavior,
            writeback_cache,
            files: Mutex::default(),
        })
    }

    fn behavior(&self) -> Behavior {
        *self.behavior.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, Arc<File>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, ino: INodeNo) -> Result<Arc<File>, Errno> {
        self.files().get(&ino.0).cloned().ok_or(Errno::ESTALE)
    }

    fn path(&self, name: &OsStr) -> PathBuf {
        self.dir.join(name)
    }

    fn look_up(&self, name: &OsStr) -> Result<FileAttr, Errno> {
        let path = self.path(name);
        let metadata = fs::symlink_metadata(&path)?;
        if !metadata.is_file() {
            return Err(Errno::EINVAL);
        }
        if let Entry::Vacant(unknown) = self.files().entry(metadata.ino()) {
            let file = File::options().read(true).write(true).open(&path)?;
            unknown.insert(Arc::new(file));
        }
        Ok(attributes(&metadata, INodeNo(metadata.ino())))
    }

    fn attributes(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        if ino == INodeNo::ROOT {
            return Ok(attributes(&self.dir.metadata()?, ino));
        }
        Ok(attributes(&self.file(ino)?.metadata()?, ino))
    }

    /// Returns flags that bypass the page cache if it would hide the results of reads. The other
    /// flags keep dirty pages in the cache: without them, the kernel writes back on each `open` and
    /// `close`.
    fn open_flags(&self) -> FopenFlags {
        match self.behavior().reads {
            Reads::Whole => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
            Reads::Short | Reads::FailAt(_) => FopenFlags::FOPEN_DIRECT_IO,
        }
    }

    fn read(&self, ino: INodeNo, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let file = self.file(ino)?;
        let mut bytes = vec![0; size as usize];
        match self.behavior().reads {
            Reads::Whole => {}
            Reads::Short => bytes.truncate(SHORT_READ),
            Reads::FailAt(at) if (offset..offset + u64::from(size)).contains(&at) => {
                return Err(Errno::EIO);
            }
            Reads::FailAt(_) => {}
        }
        let mut read = 0;
        while read < bytes.len() {
            match file.read_at(&mut bytes[read..], offset + read as u64)? {
                0 => break,
                len => read += len,
            }
        }
        bytes.truncate(read);
        Ok(bytes)
    }

    fn create(&self, name: &OsStr, mode: u32) -> Result<FileAttr, Errno> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(self.path(name))?;
        self.look_up(name)
    }

    fn seek(&self, ino: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
        let file = self.file(ino)?;
        let len = file.metadata()?.len();
        let whence = match whence {
            nix::libc::SEEK_DATA => Whence::SeekData,
            nix::libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(Errno::EINVAL),
        };
        let inside = u64::try_from(offset).is_ok_and(|offset| offset < len);
        match (self.behavior().lseek, whence) {
            (Lseek::AllHole, Whence::SeekHole) if inside => return Ok(offset),
            (Lseek::AllHole | Lseek::DataIsEnxio, Whence::SeekData)
            | (Lseek::HoleIsEnxio, Whence::SeekHole) => return Err(Errno::ENXIO),
            _ => {}
        }
        lseek(&*file, offset, whence).map_err(from_nix)
    }
}

fn from_nix(errno: nix::errno::Errno) -> Errno {
    io::Error::from(errno).into()
}

fn attributes(metadata: &fs::Metadata, ino: INodeNo) -> FileAttr {
    let time = |time: io::Result<SystemTime>| time.unwrap_or(UNIX_EPOCH);
    FileAttr {
        ino,
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: time(metadata.accessed()),
        mtime: time(metadata.modified()),
        ctime: time(metadata.modified()),
        crtime: UNIX_EPOCH,
        kind: if metadata.is_dir() {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: (metadata.mode() & 0o7777) as u16,
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Replies with `$success`, or with the error of `$result`.
macro_rules! reply_with {
    ($reply:ident, $result:expr, $value:ident => $success:expr) => {
        match $result {
            Ok($value) => $success,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if self.writeback_cache {
            config
                .add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE)
                .map_err(|_| io::ErrorKind::Unsupported)?;
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        reply_with!(reply, self.look_up(name), attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply_with!(reply, self.attributes(ino), attr => reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || {
            if ino != INodeNo::ROOT {
                let file = self.file(ino)?;
                if let Some(size) = size {
                    file.set_len(size)?;
                }
                if let Some(mode) = mode {
                    file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
                }
            }
            self.attributes(ino)
        };
        reply_with!(reply, set(), attr => reply.attr(&TTL, &attr));
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = fs::remove_file(self.path(name)).map_err(Errno::from);
        reply_with!(reply, removed, _value => reply.ok());
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = nix::fcntl::RenameFlags::from_bits_truncate(flags.bits());
        let (from, to) = (self.path(name), self.path(new_name));
        let renamed = renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags).map_err(from_nix);
        reply_with!(reply, renamed, _value => reply.ok());
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), self.open_flags());
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let flags = self.open_flags();
        reply_with!(reply, self.create(name, mode), attr =>
            reply.created(&TTL, &attr, Generation(0), FileHandle(0), flags));
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply_with!(reply, self.read(ino, offset, size), bytes => reply.data(&bytes));
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let write = || Ok::<_, Errno>(self.file(ino)?.write_all_at(data, offset)?);
        reply_with!(reply, write(), _value => reply.written(data.len() as u32));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let sync = || Ok::<_, Errno>(self.file(ino)?.sync_all()?);
        reply_with!(reply, sync(), _value => reply.ok());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let list = || {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                names.push((entry.metadata()?.ino(), entry.file_name()));
            }
            names.sort();
            Ok::<_, Errno>(names)
        };
        reply_with!(reply, list(), names => {
            let dots = [".", ".."].map(|name| (self.root, name.into()));
            let all = dots.into_iter().chain(names).enumerate();
            for (index, (ino, name)) in all.skip(offset as usize) {
                let kind = if index < 2 { FileType::Directory } else { FileType::RegularFile };
                if reply.add(INodeNo(ino), index as u64 + 1, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // Enough space for every test.
        reply.statfs(1 << 30, 1 << 30, 1 << 30, 1 << 20, 1 << 20, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let allocate = || {
            let flags = FallocateFlags::from_bits_truncate(mode);
            let (offset, length) = (offset.cast_signed(), length.cast_signed());
            fallocate(&*self.file(ino)?, flags, offset, length).map_err(from_nix)
        };
        reply_with!(reply, allocate(), _value => reply.ok());
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        reply_with!(reply, self.seek(ino, offset, whence), found => reply.offset(found));
    }
}
