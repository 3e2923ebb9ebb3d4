//! The arguments that all engines share.

use std::fs::File;
use std::ops::Range;

use super::error::WriteError;
use super::progress::Progress;
use crate::limit::SizeLimit;

/// The arguments of a write, shared by all engines.
pub(super) struct Job<'a, 'm, I, S: ?Sized> {
    pub(super) file: &'a File,
    pub(super) limit: SizeLimit,
    pub(super) chunks: I,
    pub(super) chunk_size: usize,
    pub(super) source: &'m S,
    pub(super) progress: Progress<'a>,
}

/// An iterator over the chunks for an engine.
pub(super) trait Pieces: Iterator<Item = Result<Range<u64>, WriteError>> {}

impl<I: Iterator<Item = Result<Range<u64>, WriteError>>> Pieces for I {}
