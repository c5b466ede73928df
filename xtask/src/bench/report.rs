//! What `bench compare` writes: a table, JSON and a chart, with ratios to the peer.

use anyhow::{Result, bail, ensure};

use super::compare::{Cost, Tool};
use super::{chart, results};

/// The medians of a tool on a data set and place.
pub struct Row {
    /// Data set and place.
    pub data: String,
    /// What was done.
    pub action: &'static str,
    /// Tool.
    pub tool: &'static str,
    /// Medians.
    pub cost: Cost,
    /// The most requests that it may take, where that is limited.
    pub allowed: Option<u64>,
}

/// What was run.
pub struct About<'a> {
    /// Of the data sets.
    pub size: u32,
    /// Of which medians are shown.
    pub rounds: usize,
    /// The only data set, if not all.
    pub data: Option<&'a str>,
    /// fairvault's, pgBackRest's, the kernel's.
    pub versions: [String; 3],
}

/// What no process of ours may take, MiB.
const PEAK: f64 = 256.0;

type Value = fn(&Cost) -> f64;

/// The columns of ratios.
const RATIOS: [(&str, Value); 6] = [
    ("wall", |c| c.wall),
    ("CPU", |c| c.cpu),
    ("peak", |c| c.memory),
    ("stored", |c| c.stored),
    ("read", |c| c.read),
    // What is left of other things, where no store is spoken to, is nothing to be compared.
    ("network", |c| if c.network > 1.0 { c.network } else { 0.0 }),
];

/// Writes all, and prints the table. Fails if fairvault took more memory or more requests than it may.
pub fn report(rows: &[Row], about: &About<'_>) -> Result<()> {
    let mut table = String::from(
        "| data, place | action | tool | wall s | CPU s | peak MiB | stored MiB | read MiB | network MiB | requests |",
    );
    for (name, _) in RATIOS {
        table += &format!(" {name} |");
    }
    table += "\n";
    table += &"|---".repeat(10 + RATIOS.len());
    table += "|\n";
    let mut json = Vec::new();
    for row in rows {
        let base = rows
            .iter()
            .find(|base| base.tool == Tool::PeerZstd.name() && base.data == row.data && base.action == row.action)
            .map(|base| base.cost)
            .unwrap_or_default();
        let cost = row.cost;
        table += &format!(
            "| {} | {} | {} | {:.2} | {:.2} | {:.0} | {:.1} | {:.0} | {:.0} | {} |",
            row.data,
            row.action,
            row.tool,
            cost.wall,
            cost.cpu,
            cost.memory,
            cost.stored,
            cost.read,
            cost.network,
            if cost.requests > 0 {
                cost.requests.to_string()
            } else {
                String::new()
            },
        );
        let mut ratios = serde_json::Map::new();
        for (name, of) in RATIOS {
            let (ours, theirs) = (of(&cost), of(&base));
            match theirs > 0.0 && ours > 0.0 {
                true => {
                    table += &format!(" {:.2} |", ours / theirs);
                    ratios.insert(name.to_lowercase(), (ours / theirs).into());
                }
                false => table += " |",
            }
        }
        table += "\n";
        json.push(serde_json::json!({
            "data": row.data, "action": row.action, "tool": row.tool, "wall_s": cost.wall, "cpu_s": cost.cpu,
            "peak_mib": cost.memory, "stored_mib": cost.stored, "read_mib": cost.read, "network_mib": cost.network,
            "requests": cost.requests, "ratios": ratios,
        }));
    }
    let folder = results()?;
    let file = |ending: &str| match about.data {
        None => folder.join(format!("compare.{ending}")),
        Some(data) => folder.join(format!("compare-{data}.{ending}")),
    };
    let versions: Vec<&str> = about.versions.iter().map(|version| version.trim()).collect();
    let json = serde_json::json!({ "size": about.size, "rounds": about.rounds, "versions": versions, "rows": json });
    std::fs::write(file("md"), &table)?;
    std::fs::write(file("json"), format!("{json}\n"))?;
    std::fs::write(file("svg"), chart::bars(rows, Tool::PeerZstd.name()))?;
    println!("\n{table}\nwritten to {}", folder.display());
    let ours = [Tool::Ours, Tool::OursZstd].map(Tool::name);
    let mut large = rows
        .iter()
        .filter(|row| ours.contains(&row.tool) && row.cost.memory > PEAK);
    let first = large.next();
    ensure!(
        first.is_none(),
        "{} of {} took more than {PEAK} MiB",
        first.map_or("", |row| row.action),
        first.map_or("", |row| row.data.as_str())
    );
    let is_more = |row: &&Row| row.allowed.is_some_and(|allowed| row.cost.requests > allowed);
    if let Some(row) = rows.iter().find(is_more) {
        let allowed = row.allowed.unwrap_or_default();
        bail!(
            "{} of {}: {} requests instead of {allowed}",
            row.action,
            row.data,
            row.cost.requests
        );
    }
    Ok(())
}
