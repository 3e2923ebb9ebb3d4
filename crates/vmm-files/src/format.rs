//! The formats of files that can be read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A format of files with the memory of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// An ELF core of guest-physical memory: `virsh dump --memory-only`, QEMU's
    /// `dump-guest-memory`, `/proc/vmcore`.
    Elf,
    /// A migration stream of QEMU with the capability `mapped-ram` (QEMU 9.0 and newer).
    Qemu,
    /// A file of `virsh save` with the image format `sparse`.
    Libvirt,
    /// The directory of a snapshot of Cloud Hypervisor.
    CloudHypervisor,
    /// A `.vmem` file of VMware with its `.vmsn` or `.vmss` file.
    Vmware,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 5] = [
        Self::Elf,
        Self::Qemu,
        Self::Libvirt,
        Self::CloudHypervisor,
        Self::Vmware,
    ];

    /// Returns the name, as command lines use it: `cloud-hypervisor`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::Qemu => "qemu",
            Self::Libvirt => "libvirt",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Vmware => "vmware",
        }
    }

    /// Returns what a file of the format is, in words.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Elf => "ELF core",
            Self::Qemu => "mapped-ram file of QEMU",
            Self::Libvirt => "sparse save file of libvirt",
            Self::CloudHypervisor => "snapshot of Cloud Hypervisor",
            Self::Vmware => "state file of VMware",
        }
    }

    /// Returns the format of the file or directory at `path` by its magic numbers, or by the names
    /// of the files in a directory. Returns `None` for everything else, such as raw memory.
    ///
    /// A `.vmem` file is raw memory, whose bytes the guest controls. The `.vmsn` or `.vmss` file
    /// beside it is recognized. Likewise, a guest can make its raw memory look like any other
    /// format: detect the format only of files that are not raw memory.
    ///
    /// # Errors
    /// Returns an error if the path cannot be opened or read.
    pub fn detect(path: &Path) -> io::Result<Option<Self>> {
        if path.is_dir() {
            let names = ["state.json", "memory-ranges"];
            let has_all = names.iter().all(|name| path.join(name).is_file());
            return Ok(has_all.then_some(Self::CloudHypervisor));
        }
        let file = crate::source::open_without_waiting(path)?;
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        Self::of_file(&file)
    }

    fn of_file(file: &File) -> io::Result<Option<Self>> {
        let mut first = [0; 16];
        let mut len = 0;
        while len < first.len() {
            match file.read_at(&mut first[len..], len as u64) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(match &first {
            [0x7f, b'E', b'L', b'F', ..] => Some(Self::Elf),
            [b'Q', b'E', b'V', b'M', ..] => Some(Self::Qemu),
            b"LibvirtQemudSave" | b"LibvirtQemudPart" => Some(Self::Libvirt),
            _ if crate::vmware::is_magic(&first) => Some(Self::Vmware),
            _ => None,
        })
    }
}
