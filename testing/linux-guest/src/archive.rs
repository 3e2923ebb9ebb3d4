//! The cpio archive that the kernel unpacks into its first root: the format "newc" of `cpio(5)`.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Writes an archive to `out`, entry by entry; [`finish`](Self::finish) ends it.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    written: usize,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
        }
    }

    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    pub fn program(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.entry(name, PROGRAM, bytes)
    }

    /// A directory of the disk with all that is in it, as `name`.
    pub fn tree(&mut self, name: &str, dir: &Path) -> io::Result<()> {
        self.directory(name)?;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let below = format!("{name}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                self.tree(&below, &entry.path())?;
            } else {
                self.program(&below, &fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, four device numbers, the name's length with
        // its NUL, no checksum.
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            bytes.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(bytes)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let to = self.written.next_multiple_of(4);
        self.put(&[0; 3][..to - self.written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_a_name_and_bytes_each_padded_to_four() {
        let mut archive = Archive::new(Vec::new());
        archive.program("init", b"#!/bin/sh").expect("memory");
        let bytes = archive.finish().expect("memory");
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081ed", "a regular file, 0755");
        assert_eq!(&bytes[54..62], b"00000009", "its size");
        assert_eq!(&bytes[94..102], b"00000005", "the name's length");
        assert_eq!(&bytes[110..128], b"init\0\0#!/bin/sh\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
