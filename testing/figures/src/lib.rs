//! Figures of benchmarks and simulations: as data, and as charts.
//!
//! `benches` writes a [`report`] that `cargo xtask bench` turns into a page. That page and the one
//! of `cargo xtask adaptive` have [charts](chart).

#![forbid(unsafe_code)]

pub mod chart;
pub mod report;
