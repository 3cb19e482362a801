//! The report as a picture: rows of bars, drawn as SVG.
//!
//! ```text
//! ctr run --rm of echo     caisson ▇▇▇▇▇▇▇▇▇▇▇
//!                          runc    ▇▇▇▇▇▇▇▇▇
//! exec, kill, 50 pods     (the same pair for each)
//! where a cold start goes  ▇▇ shim ▇ vmm ▇▇▇▇▇ kernel ▇ agent ▇▇ container
//! memory of an idle pod    shim ▇▇  vmm ▇  fsd ▇
//! ```

use std::fmt::Write as _;

use crate::figures::{Figure, Report};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 190.0;
const ROW: f64 = 26.0;
const COLOURS: [&str; 7] = ["#3b6fb6", "#e08a1e", "#4f9d69", "#b5485d", "#7a5ba6", "#5aa0a8", "#8a8a8a"];

/// Draws it.
pub fn draw(report: &Report) -> String {
    let mut picture = Picture { body: String::new(), y: 20.0 };
    picture.heading("ctr run --rm of echo (ms)");
    picture.bars(report, &[("caisson", "ctr_run_caisson_ms"), ("runc", "ctr_run_runc_ms")]);
    if let Some(ratio) = report.median("ctr_run_ratio_cold") {
        picture.note(&format!("caisson / runc = {ratio:.2}"));
    }
    for (title, name) in [
        ("ctr task exec of true (ms)", "ctr_exec"),
        ("from ctr task kill to the exit event (ms)", "kill_to_exit_event"),
        ("50 pods, 8 at a time (ms)", "pods_50_by_8"),
    ] {
        let [caisson, runc] = ["caisson", "runc"].map(|runtime| format!("{name}_{runtime}_ms"));
        picture.heading(title);
        picture.bars(report, &[("caisson", &caisson), ("runc", &runc)]);
    }
    for (place, title, _) in crate::storage::PLACES {
        let ratios: Vec<(&str, String)> =
            crate::storage::STEPS.iter().map(|step| (*step, format!("{place}_{step}_ratio"))).collect();
        let ratios: Vec<(&str, &str)> = ratios.iter().map(|(step, name)| (*step, &**name)).collect();
        picture.heading(&format!("files on {title}: caisson / runc"));
        picture.bars(report, &ratios);
    }
    let speeds: Vec<(&str, String)> =
        crate::network::MOVES.iter().map(|(name, title, ..)| (*title, format!("{name}_ratio"))).collect();
    let speeds: Vec<(&str, &str)> = speeds.iter().map(|(title, name)| (*title, &**name)).collect();
    picture.heading("speed of a pod's network: caisson / runc");
    picture.bars(report, &speeds);
    for (title, name) in [
        ("round trip of a byte over TCP, the middle one (ms)", "round_trip_p50"),
        ("ctr run of echo on a ready network, to its output (ms)", "start_with_network"),
    ] {
        let [caisson, runc] = ["caisson", "runc"].map(|runtime| format!("{name}_{runtime}_ms"));
        picture.heading(title);
        picture.bars(report, &[("caisson", &caisson), ("runc", &runc)]);
    }
    picture.heading("where a cold start goes (ms)");
    let stages: Vec<(&str, &str)> = report
        .0
        .keys()
        .filter_map(|name| {
            let label = name.strip_prefix("stage_")?.get(2..)?.strip_suffix("_ms")?;
            Some((label, name.as_str()))
        })
        .collect();
    picture.cascade(report, &stages);
    picture.heading("memory of an idle pod, proportional, beyond guest RAM (MiB)");
    picture.bars(report, &[("shim", "shim_pss_mib"), ("vmm", "vmm_pss_mib"), ("fsd", "fsd_pss_mib")]);
    picture.heading("sizes (MiB)");
    picture.bars(
        report,
        &[
            ("kernel", "kernel_mib"),
            ("initramfs", "initramfs_mib"),
            ("shim", "shim_binary_mib"),
            ("vmm", "vmm_binary_mib"),
            ("fsd", "fsd_binary_mib"),
        ],
    );
    picture.finish()
}

struct Picture {
    body: String,
    y: f64,
}

impl Picture {
    // Writing to a String cannot fail, so the results of write! are dropped below.

    fn heading(&mut self, text: &str) {
        self.y += 16.0;
        let _ = writeln!(self.body, r#"<text x="16" y="{:.0}" font-weight="bold">{}</text>"#, self.y, escape(text));
        self.y += 10.0;
    }

    fn note(&mut self, text: &str) {
        let _ = writeln!(self.body, r#"<text x="{LEFT}" y="{:.0}">{}</text>"#, self.y + 14.0, escape(text));
        self.y += ROW;
    }

    /// One bar for each figure that there is, from the left, with a line from its smallest to its largest run.
    fn bars(&mut self, report: &Report, names: &[(&str, &str)]) {
        let figures: Vec<(&str, &Figure)> =
            names.iter().filter_map(|(label, name)| Some((*label, report.0.get(*name)?))).collect();
        let scale = scale(figures.iter().map(|(_, figure)| figure.max).fold(0.0, f64::max));
        for (index, (label, figure)) in figures.into_iter().enumerate() {
            self.bar(label, 0.0, figure, scale, COLOURS[index % COLOURS.len()]);
        }
    }

    /// Bars that begin where the one before ends.
    fn cascade(&mut self, report: &Report, names: &[(&str, &str)]) {
        let figures: Vec<(&str, &Figure)> =
            names.iter().filter_map(|(label, name)| Some((*label, report.0.get(*name)?))).collect();
        let scale = scale(figures.iter().map(|(_, figure)| figure.median).sum());
        let mut from = 0.0;
        for (index, (label, figure)) in figures.into_iter().enumerate() {
            self.bar(&label.replace('_', " "), from, figure, scale, COLOURS[index % COLOURS.len()]);
            from += figure.median;
        }
    }

    fn bar(&mut self, label: &str, from: f64, figure: &Figure, scale: f64, colour: &str) {
        let (x, width, y) = (LEFT + from * scale, (figure.median * scale).max(1.0), self.y);
        // Beyond the line of the runs, where there is one.
        let end = if from == 0.0 { LEFT + figure.max * scale } else { x + width };
        let _ = writeln!(
            self.body,
            r#"<text x="{:.0}" y="{:.0}" text-anchor="end">{}</text>
<rect x="{x:.1}" y="{:.0}" width="{width:.1}" height="16" fill="{colour}"/>
<text x="{:.1}" y="{:.0}">{:.2}</text>"#,
            LEFT - 8.0,
            y + 15.0,
            escape(label),
            y + 2.0,
            end.max(x + width) + 6.0,
            y + 15.0,
            figure.median,
        );
        if figure.max > figure.min && from == 0.0 {
            let (low, high) = (LEFT + figure.min * scale, LEFT + figure.max * scale);
            let _ = writeln!(
                self.body,
                r#"<path d="M{low:.1} {0:.0}H{high:.1}" stroke="black" stroke-width="2"/>"#,
                y + 10.0
            );
        }
        self.y += ROW;
    }

    fn finish(self) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{:.0}\" \
             font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.y + 16.0,
            self.body
        )
    }
}

fn scale(largest: f64) -> f64 {
    (WIDTH - LEFT - 80.0) / largest.max(f64::MIN_POSITIVE)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_of_the_picture_is_drawn_with_its_median() {
        let mut report = Report::default();
        report.add("ctr_run_caisson_ms", &[350.0, 352.0], "ms");
        report.add("ctr_run_runc_ms", &[300.0], "ms");
        report.add("stage_3_kernel_ms", &[61.5], "ms");
        let picture = draw(&report);
        assert_eq!(picture.matches("<rect x=").count(), 3);
        assert!(["351.00", "300.00", "61.50"].iter().all(|value| picture.contains(&format!(">{value}</text>"))));
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    }
}
