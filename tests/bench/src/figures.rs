//! Figures with a name, and the report that they make.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use caisson_e2e::Runtime;
use serde::{Deserialize, Serialize};

/// One measured quantity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The middle one of the runs (the mean of the middle two of an even number).
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// ms, MiB, MiB/s, packets/s, M for millions, x for a ratio, or nothing for a plain number.
    pub unit: String,
    /// How often it was measured.
    pub runs: usize,
}

impl Figure {
    /// Of the measured values. None if there are none.
    pub fn of(values: &[f64], unit: &str) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + upper) / 2.0 } else { upper };
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        let (median, min, max) = (round(median), round(min), round(max));
        Some(Self { median, min, max, unit: unit.to_owned(), runs: sorted.len() })
    }
}

/// Every figure by its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Report(pub BTreeMap<String, Figure>);

impl Report {
    /// Adds the figure of `values`, if there are any.
    pub fn add(&mut self, name: &str, values: &[f64], unit: &str) {
        if let Some(figure) = Figure::of(values, unit) {
            self.0.insert(name.to_owned(), figure);
        }
    }

    /// A figure's median.
    pub fn median(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|figure| figure.median)
    }

    /// For the terminal.
    pub fn table(&self) -> String {
        let mut text =
            format!("{:<44} {:>10} {:>10} {:>10}  {:<9} {:>4}\n", "figure", "median", "min", "max", "unit", "runs");
        for (name, Figure { median, min, max, unit, runs }) in &self.0 {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<44} {median:>10.3} {min:>10.3} {max:>10.3}  {unit:<9} {runs:>4}");
        }
        text
    }
}

/// The times that something took with each runtime in turn.
#[derive(Default)]
pub struct Pair {
    caisson: Vec<f64>,
    runc: Vec<f64>,
}

impl Pair {
    /// Adds one.
    pub fn push(&mut self, runtime: Runtime, time: Duration) {
        let times = match runtime {
            Runtime::Caisson => &mut self.caisson,
            Runtime::Runc => &mut self.runc,
        };
        times.push(time.as_secs_f64() * 1000.0);
    }

    /// What this took beyond what `other` took, run by run.
    pub fn minus(&self, other: &Self) -> Self {
        let less = |these: &[f64], those: &[f64]| these.iter().zip(those).map(|(this, that)| this - that).collect();
        Self { caisson: less(&self.caisson, &other.caisson), runc: less(&self.runc, &other.runc) }
    }

    /// Adds three figures of what `of` makes of each time: `<name>_caisson`, `<name>_runc` and, of each two, `<name>_ratio`.
    pub fn report_as(&self, report: &mut Report, name: &str, unit: &str, of: impl Fn(f64) -> f64) {
        let [caisson, runc] =
            [&self.caisson, &self.runc].map(|times| times.iter().map(|ms| of(*ms)).collect::<Vec<_>>());
        report.add(&format!("{name}_caisson"), &caisson, unit);
        report.add(&format!("{name}_runc"), &runc, unit);
        let ratios: Vec<f64> = caisson.iter().zip(&runc).map(|(caisson, runc)| caisson / runc).collect();
        report.add(&format!("{name}_ratio"), &ratios, "x");
    }

    /// Adds two figures: `<name>_caisson_ms` and `<name>_runc_ms`, for differences, of which a ratio says nothing.
    pub fn report_ms(&self, report: &mut Report, name: &str) {
        report.add(&format!("{name}_caisson_ms"), &self.caisson, "ms");
        report.add(&format!("{name}_runc_ms"), &self.runc, "ms");
    }

    /// Adds three figures: `<name>_caisson_ms`, `<name>_runc_ms` and, of each two, `<name>_<ratio>`.
    pub fn report(&self, report: &mut Report, name: &str, ratio: &str) {
        self.report_ms(report, name);
        let ratios: Vec<f64> = self.caisson.iter().zip(&self.runc).map(|(caisson, runc)| caisson / runc).collect();
        report.add(&format!("{name}_{ratio}"), &ratios, "x");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        let figure = Figure::of(&[9.0, 1.0, 2.0], "ms").unwrap();
        assert_eq!((figure.median, figure.min, figure.max, figure.runs), (2.0, 1.0, 9.0, 3));
        assert_eq!(Figure::of(&[4.0, 1.0, 2.0, 3.0], "ms").unwrap().median, 2.5);
        assert_eq!(Figure::of(&[], "ms"), None);
    }

    #[test]
    fn speeds_are_compared_as_speeds() {
        let (mut with, mut without, mut report) = (Pair::default(), Pair::default(), Report::default());
        for (runtime, ms) in [(Runtime::Caisson, 40), (Runtime::Runc, 10)] {
            with.push(runtime, Duration::from_millis(ms));
            without.push(runtime, Duration::from_millis(8));
        }
        with.report_as(&mut report, "tcp", "MiB/s", |ms| 1000.0 / ms);
        with.minus(&without).report_ms(&mut report, "adds");
        let expected = [("tcp_caisson", 25.0), ("tcp_runc", 100.0), ("tcp_ratio", 0.25), ("adds_caisson_ms", 32.0)];
        assert!(expected.iter().all(|(name, value)| report.median(name) == Some(*value)), "{report:?}");
        assert_eq!(report.median("adds_ratio"), None);
    }

    #[test]
    fn a_report_is_an_object_of_figures() {
        let mut report = Report::default();
        report.add("ctr_run_runc_ms", &[300.0], "ms");
        report.add("nothing", &[], "ms");
        let expected = r#"{"ctr_run_runc_ms":{"median":300.0,"min":300.0,"max":300.0,"unit":"ms","runs":1}}"#;
        assert_eq!(serde_json::to_string(&report).unwrap(), expected);
    }
}
