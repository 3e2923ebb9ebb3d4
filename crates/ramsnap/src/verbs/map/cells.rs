//! RAM divided into cells, with the state of each cell.

use crate::print::{self, size};
use crate::verbs::map::{PageMap, State};

/// Lines of cells, each of which stands for a part of the RAM of the same size.
#[derive(Debug, Default)]
pub(super) struct Picture {
    pub(super) ram_bytes: u64,
    pub(super) cell_bytes: u64,
    pub(super) lines: Vec<Line>,
}

#[derive(Debug)]
pub(super) struct Line {
    pub(super) label: String,
    pub(super) cells: Vec<Cell>,
}

/// The shares of the bytes of a cell, from 0 to 1. The rest is clean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cell {
    pub(super) present: f64,
    pub(super) zero: f64,
}

impl Picture {
    /// Draws one image in at most `lines` lines of `columns` cells.
    pub(super) fn of_one(map: &PageMap, columns: u64, lines: u64) -> Self {
        let cell_bytes = cell_bytes(map, columns * lines);
        let cells = cells(map, cell_bytes);
        let line = |(number, cells): (usize, &[Cell])| Line {
            label: size(number as u64 * columns * cell_bytes),
            cells: cells.to_vec(),
        };
        let lines = cells.chunks(columns as usize).enumerate().map(line);
        Self {
            ram_bytes: map.ram_bytes,
            cell_bytes,
            lines: lines.collect(),
        }
    }

    /// Draws a line for each image, of at most `columns` cells.
    pub(super) fn of_several(maps: &[PageMap], columns: u64) -> Self {
        let Some(first) = maps.first() else {
            return Self::default();
        };
        let cell_bytes = cell_bytes(first, columns);
        let line = |map: &PageMap| Line {
            label: print::path(map.file.file_name().unwrap_or_default().as_ref()),
            cells: cells(map, cell_bytes),
        };
        Self {
            ram_bytes: first.ram_bytes,
            cell_bytes,
            lines: maps.iter().map(line).collect(),
        }
    }

    pub(super) fn title(&self) -> String {
        let (ram, cell) = (size(self.ram_bytes), size(self.cell_bytes));
        format!("{ram} of RAM, {cell} a cell")
    }

    /// Returns the length of the longest line.
    pub(super) fn columns(&self) -> usize {
        let cells = self.lines.iter().map(|line| line.cells.len());
        cells.max().unwrap_or(0)
    }
}

/// Returns the size of a cell: whole pages, with at most `most` cells.
fn cell_bytes(map: &PageMap, most: u64) -> u64 {
    map.ram_bytes.div_ceil(most).div_ceil(map.page_bytes) * map.page_bytes
}

fn cells(map: &PageMap, cell_bytes: u64) -> Vec<Cell> {
    let mut cells = vec![Cell::default(); map.ram_bytes.div_ceil(cell_bytes) as usize];
    for run in &map.runs {
        let (mut at, end) = (run.offset, run.offset + run.bytes);
        while at < end {
            let start = at / cell_bytes * cell_bytes;
            let cell_end = map.ram_bytes.min(start + cell_bytes);
            let here = end.min(cell_end) - at;
            let share = here as f64 / (cell_end - start) as f64;
            let cell = &mut cells[(at / cell_bytes) as usize];
            match run.state {
                State::Present => cell.present += share,
                State::Zero | State::Hole => cell.zero += share,
            }
            at += here;
        }
    }
    cells
}

/// Returns the displayed value of a share: its square root, so that a few pages remain visible.
pub(super) fn visible(share: f64) -> f64 {
    share.clamp(0.0, 1.0).sqrt()
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::verbs::map::Run;

    fn map(ram_bytes: u64, present: &[Range<u64>]) -> PageMap {
        let run = |range: &Range<u64>| Run::new(range.clone(), State::Present);
        PageMap {
            file: std::path::PathBuf::from("d1.mem").into(),
            ram_bytes,
            page_bytes: 4096,
            runs: present.iter().map(run).collect(),
        }
    }

    #[test]
    fn every_page_is_in_one_cell_also_where_the_last_is_smaller() {
        // 10 pages in cells of 4: the last one has 2.
        let map = map(
            10 * 4096,
            &[0..4096, 3 * 4096..5 * 4096, 9 * 4096..10 * 4096],
        );
        let picture = Picture::of_one(&map, 3, 1);
        assert_eq!(picture.cell_bytes, 4 * 4096);
        let shares: Vec<_> = picture.lines[0].cells.iter().map(|it| it.present).collect();
        assert_eq!(shares, [0.5, 0.25, 0.5]);
    }

    #[test]
    fn no_cell_is_smaller_than_a_page() {
        let picture = Picture::of_several(&[map(8192, &[0..4096])], 80);
        assert_eq!((picture.cell_bytes, picture.columns()), (4096, 2));
    }
}
