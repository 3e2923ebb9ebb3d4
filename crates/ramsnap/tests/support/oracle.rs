//! Reads chains in the simplest way: each run of each footer, oldest image first.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use image_format::{Footer, ImageKind, Storage};

use crate::support::RAM;

/// Returns the RAM of a chain of sealed and packed images, or of one raw file.
pub(crate) fn ram_of(paths: &[PathBuf]) -> Result<Vec<u8>, String> {
    let failed = |path: &PathBuf, why: &dyn ToString| format!("{path:?}: {}", why.to_string());
    let mut ram = vec![0; RAM as usize];
    let mut newest = None;
    for path in paths {
        let file = File::open(path).map_err(|error| failed(path, &error))?;
        let footer = match Footer::read(&file) {
            Ok(footer) => footer,
            Err(_) if paths.len() == 1 => return Ok(fs::read(path).unwrap()),
            Err(error) => return Err(failed(path, &error)),
        };
        match (footer.kind, newest) {
            (ImageKind::Full, None) => {}
            (ImageKind::Diff { parent }, Some(newest)) if parent == Some(newest) => {}
            other => return Err(failed(path, &format!("{other:?}"))),
        }
        for run in &footer.runs {
            let part = &mut ram[run.start as usize..(run.start + run.len) as usize];
            match run.stored {
                Storage::At(offset) => file.read_exact_at(part, offset).unwrap(),
                Storage::Zeros => part.fill(0),
            }
        }
        newest = Some(footer.id);
    }
    Ok(ram)
}
