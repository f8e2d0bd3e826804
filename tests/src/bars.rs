//! Benchmarks' results as pictures of bars, `docs/NAME.svg`.

use std::fmt::Write as _;

use anyhow::Context as _;

use crate::cluster::repository;

const WIDTH: f64 = 900.0;
const PANEL_HEIGHT: f64 = 190.0;
const LEFT: f64 = 60.0;
const BAR_MAX: f64 = 26.0;
/// Of a legend's entry.
const NAME_WIDTH: f64 = 100.0;
const COLOURS: [&str; 8] =
    ["#555555", "#888888", "#bbbbbb", "#0b6e99", "#4aa3c7", "#c77b30", "#9b59b6", "#6aa84f"];

/// How values become heights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// From this value; smaller ones have no height.
    Logarithmic(f64),
}

/// Groups of bars, in each one a name.
#[derive(Debug, Clone)]
pub struct Panel {
    /// What the values are, and of what.
    pub title: String,
    /// See [`Scale`].
    pub scale: Scale,
    /// Drawn across as dashes.
    pub limits: Vec<f64>,
    /// Label and values; `None` where there is none.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

impl Panel {
    fn most(&self) -> f64 {
        let values = self.groups.iter().flat_map(|(_, values)| values.iter().flatten());
        values.chain(&self.limits).fold(0.1_f64, |most, value| most.max(*value))
    }

    /// Where a value is between bottom (0) and top (1).
    fn share(&self, value: f64) -> f64 {
        let most = self.most();
        let share = match self.scale {
            Scale::Linear => value / most,
            Scale::Logarithmic(least) => (value / least).ln() / (most / least).ln(),
        };
        share.clamp(0.0, 1.0)
    }

    /// Values that are written beside the panel.
    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => [0.0, 0.5, 1.0].map(|share| share * self.most()).to_vec(),
            Scale::Logarithmic(least) => {
                let tenfold = |value: &f64| Some(10.0 * value);
                std::iter::successors(Some(least), tenfold)
                    .take_while(|value| *value <= self.most())
                    .collect()
            }
        }
    }

    fn draw(&self, svg: &mut String, names: usize, top: f64) -> std::fmt::Result {
        let (bottom, end) = (top + PANEL_HEIGHT - 55.0, WIDTH - 20.0);
        let y = |value| bottom - self.share(value) * (bottom - top);
        let title = &self.title;
        writeln!(svg, "<text x='{LEFT}' y='{}' font-weight='bold'>{title}</text>", top - 8.0)?;
        for tick in self.ticks() {
            let (at, label) = (y(tick), if tick < 1.0 { 2 } else { 1 });
            writeln!(
                svg,
                "<line x1='{LEFT}' y1='{at:.1}' x2='{end}' y2='{at:.1}' stroke='#ddd'/>"
            )?;
            writeln!(
                svg,
                "<text x='{}' y='{:.1}' text-anchor='end'>{tick:.label$}</text>",
                LEFT - 6.0,
                at + 4.0
            )?;
        }
        let group_width = (end - LEFT) / self.groups.len().max(1) as f64;
        let bar = (group_width / (names as f64 + 1.0)).min(BAR_MAX);
        for (place, (label, values)) in self.groups.iter().enumerate() {
            let x = LEFT + group_width * place as f64 + 6.0;
            for (number, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let (left, width, colour) =
                    (x + bar * number as f64, bar - 2.0, COLOURS[number % COLOURS.len()]);
                let (top, height) = (y(*value), bottom - y(*value));
                writeln!(
                    svg,
                    "<rect x='{left:.1}' y='{top:.1}' width='{width:.1}' height='{height:.1}' fill='{colour}'/>"
                )?;
            }
            let (middle, under) = (x + bar * values.len() as f64 / 2.0, bottom + 16.0);
            writeln!(svg, "<text x='{middle:.1}' y='{under}' text-anchor='middle'>{label}</text>")?;
        }
        for limit in &self.limits {
            let at = y(*limit);
            writeln!(
                svg,
                "<line x1='{LEFT}' y1='{at:.1}' x2='{end}' y2='{at:.1}' stroke='#c1121f' stroke-dasharray='6 4'/>"
            )?;
        }
        Ok(())
    }
}

/// Writes the picture.
pub fn draw(picture: &str, names: &[&str], panels: &[Panel]) -> anyhow::Result<()> {
    let height = 50.0 + PANEL_HEIGHT * panels.len() as f64;
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' \
         font-family='sans-serif' font-size='12'>\n<rect width='100%' height='100%' fill='white'/>\n"
    );
    for (number, name) in names.iter().enumerate() {
        let x = LEFT + NAME_WIDTH * number as f64;
        let colour = COLOURS[number % COLOURS.len()];
        writeln!(svg, "<rect x='{x}' y='12' width='12' height='12' fill='{colour}'/>")?;
        writeln!(svg, "<text x='{}' y='23'>{name}</text>", x + 17.0)?;
    }
    for (number, panel) in panels.iter().enumerate() {
        panel.draw(&mut svg, names.len(), 60.0 + PANEL_HEIGHT * number as f64)?;
    }
    svg.push_str("</svg>\n");
    let path = repository().join("docs").join(format!("{picture}.svg"));
    std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))
}
