//! Mounts on macOS: disk images by `hdiutil`, and an export of this machine to itself.
//!
//! Never run on a Mac. The tests run all of it on any system, with programs of their own in place
//! of macOS's.

mod disk_image;
mod nfs_export;
mod system;
#[cfg(test)]
mod tests;

#[cfg(target_os = "macos")]
pub(crate) use here::{mount, packages};

#[cfg(target_os = "macos")]
mod here {
    use anyhow::bail;
    use file_systems::MacOs;
    use harness::kernel;
    use harness::packages::Package;

    use super::super::{Images, Mount, elsewhere};
    use super::disk_image::DiskImage;
    use super::nfs_export::Export;
    use super::system::System;
    use crate::kind::Kind;

    /// Returns nothing: macOS has all of it on board.
    pub(crate) fn packages() -> Vec<Package> {
        Vec::new()
    }

    pub(crate) fn mount(kind: Kind, images: &Images) -> anyhow::Result<Mount> {
        let system = System::this();
        let fs = match kind.macos {
            Some(MacOs::Image(fs)) => fs,
            Some(MacOs::Nfs) => return nfs(system),
            None => bail!("{kind} cannot be mounted on macOS"),
        };
        let (main, small) = (
            DiskImage::attach(&system, images, fs, "8g")?,
            DiskImage::attach(&system, images, fs, "64m")?,
        );
        let (elsewhere, guard) = elsewhere()?;
        Ok(Mount {
            dir: main.mount_point().to_owned(),
            small: Some(small.mount_point().to_owned()),
            elsewhere,
            driver: kernel(),
            guards: vec![Box::new(main), Box::new(small), guard],
        })
    }

    fn nfs(system: System) -> anyhow::Result<Mount> {
        let export = Export::new(system)?;
        let (elsewhere, guard) = elsewhere()?;
        Ok(Mount {
            dir: export.mount_point().to_owned(),
            small: None,
            elsewhere,
            driver: kernel(),
            guards: vec![Box::new(export), guard],
        })
    }
}
