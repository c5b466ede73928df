//! What `bench compare` writes: a table, JSON and a chart, with ratios to the peer.

use anyhow::Result;

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
}

type Value = fn(&Cost) -> f64;

/// The columns of ratios.
const RATIOS: [(&str, Value); 6] = [
    ("wall", |c| c.wall),
    ("CPU", |c| c.cpu),
    ("peak", |c| c.memory),
    ("stored", |c| c.stored),
    ("read", |c| c.read),
    ("network", |c| c.network),
];

/// Writes all, and prints the table.
pub fn report(rows: &[Row], size: u32) -> Result<()> {
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
    std::fs::write(folder.join("compare.md"), &table)?;
    let json = serde_json::json!({ "size": size, "rows": json });
    std::fs::write(folder.join("compare.json"), format!("{json}\n"))?;
    std::fs::write(folder.join("compare.svg"), chart::bars(rows, Tool::PeerZstd.name()))?;
    println!("\n{table}\nwritten to {}", folder.display());
    Ok(())
}
