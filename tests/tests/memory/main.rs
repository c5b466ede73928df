//! What collection holds in memory: something for each pack, one index run at a time, and nothing for each chunk.
//!
//! The collector is the real binary, in a process of its own, over a stanza that has everything but the content of its
//! packs. `cargo xtask memory [MILLIONS]` does it with 50 million chunks.

mod made;
#[path = "../stores/mod.rs"]
mod stores;

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_engine::dedup::{Index, read_run};
use fairvault_format::names;
use fairvault_tests::Scratch;
use fairvault_tests::dice::number;

use made::Shape;

/// What 50 million chunks may cost, bytes.
const MOST: u64 = 1 << 30;
/// Bytes that a collector may hold for a pack.
const PER_PACK: u64 = 600;
/// Bytes that a backup may hold for a chunk that is known: 48, and what is held for packs.
const PER_CHUNK: f64 = 52.0;
/// Bytes that a collector may hold more for runs that are four times as large.
const FOR_RUNS: u64 = 16 << 20;

/// A line of /proc about a process, bytes.
fn status(pid: u32, what: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(what));
    let kilobytes = line.context("no such line")?.trim_start_matches(':');
    let kilobytes: u64 = kilobytes.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024)
}

/// What a collector did.
struct Collected {
    /// The most that it held, bytes.
    peak: u64,
    packs: u64,
    thin: u64,
    took: Duration,
}

/// Runs the collector, and watches it.
fn collect(scratch: &Scratch, folder: &Path) -> Result<Collected> {
    let began = Instant::now();
    let key = scratch.join("key");
    std::fs::write(&key, format!("fairvault-key-1:{}\n", "01".repeat(32)))?;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
    let mut child = std::process::Command::new(scratch.join("fairvault"))
        .args(["gc", "acme", "--output", "json", "--repo-url"])
        .arg(format!("file://{}", folder.display()))
        .arg("--key-file")
        .arg(&key)
        .arg("--cache")
        .arg(scratch.join("cache"))
        .env("HOME", scratch.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut peak = 0;
    while child.try_wait()?.is_none() {
        // It only grows; a process that has just ended has none.
        peak = status(child.id(), "VmHWM").unwrap_or(peak).max(peak);
        std::thread::sleep(Duration::from_millis(3));
    }
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success() && peak > 0, "{} {text}", output.status);
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let count = |what: &str| json["report"][what]["objects"].as_u64().context(text.clone());
    Ok(Collected {
        peak,
        packs: count("packs")?,
        thin: count("thin_packs")?,
        took: began.elapsed(),
    })
}

/// Everything that is used is there, and nothing else; and the index says so, chunk by chunk.
async fn check(folder: &Path, shape: Shape, collected: &Collected) -> Result<u64> {
    let log = made::open(folder, false).await?;
    let stanza = log.stanza();
    let numbers: HashMap<[u8; 32], u64> = (0..shape.packs).map(|pack| (Shape::name(pack), pack)).collect();
    let used = (0..shape.packs).filter(|pack| shape.is_used(*pack));
    let (thin, whole): (Vec<u64>, Vec<u64>) = used.partition(|pack| Shape::is_thin(*pack));
    let listed = stanza.store().list(names::PACKS).await?;
    for (name, _) in &listed {
        let number = names::parse_hash(name).and_then(|hash| numbers.get(&hash).copied());
        ensure!(number.is_some_and(|pack| shape.is_used(pack)), "{name} is left");
    }
    ensure!(
        listed.len() == thin.len() + whole.len(),
        "{} packs are left",
        listed.len()
    );
    ensure!(collected.packs == shape.packs - listed.len() as u64 && collected.thin >= thin.len() as u64);
    let (mut packs, mut chunks) = (0, 0);
    for hash in &log.state().index_runs {
        let run = read_run(stanza, hash).await?;
        let mut of_pack = vec![0; run.packs.len()];
        run.entries.iter().for_each(|entry| of_pack[entry.pack as usize] += 1);
        for (pack, entries) in run.packs.iter().zip(of_pack) {
            let number = numbers.get(&pack.name).context("a pack of nobody's")?;
            ensure!(shape.is_used(*number) && !Shape::is_thin(*number));
            ensure!(entries == shape.chunks_per_pack, "{entries} chunks of a pack");
        }
        packs += run.packs.len();
        chunks += run.entries.len() as u64;
    }
    ensure!(packs == whole.len() && chunks == packs as u64 * shape.chunks_per_pack);
    let runs = stanza.store().list(names::INDEX).await?.len();
    ensure!(runs == log.state().index_runs.len(), "{runs} runs");
    Ok(chunks)
}

async fn measure(shape: Shape) -> Result<Collected> {
    let scratch = Scratch::new("memory")?;
    let folder = scratch.join("repo");
    let began = Instant::now();
    made::make(&folder, shape).await?;
    let making = began.elapsed();
    let collected = collect(&scratch, &folder)?;
    let chunks = check(&folder, shape, &collected).await?;
    println!(
        "{} chunks in {} packs: {} MiB, {:.1} s (made in {:.1} s); {} packs deleted, {} chunks left",
        shape.chunks(),
        shape.packs,
        collected.peak >> 20,
        collected.took.as_secs_f64(),
        making.as_secs_f64(),
        collected.packs,
        chunks
    );
    if asked_for() > 0 {
        index(&folder, chunks).await?;
    }
    Ok(collected)
}

/// What a backup holds of the chunks that are known.
async fn index(folder: &Path, chunks: u64) -> Result<()> {
    let log = made::open(folder, false).await?;
    let before = status(std::process::id(), "VmRSS")?;
    let index = Index::load(log.stanza(), log.state()).await?;
    ensure!(index.len() as u64 == chunks, "{} chunks", index.len());
    let held = status(std::process::id(), "VmRSS")?.saturating_sub(before) as f64 / chunks as f64;
    println!("the index of a backup: {held:.1} bytes a chunk");
    ensure!(held < PER_CHUNK, "{held} bytes");
    Ok(())
}

/// Millions of chunks, if somebody wants to see more than the usual.
fn asked_for() -> u64 {
    number("FAIRVAULT_MEMORY_MILLIONS", 0)
}

fn measured(shape: Shape) -> Result<Collected> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(measure(shape))
}

#[test]
fn collection_holds_nothing_for_each_chunk() -> Result<()> {
    let few = Shape {
        packs: 8_000,
        chunks_per_pack: 60,
    };
    let many = Shape {
        chunks_per_pack: 250,
        ..few
    };
    let spread = Shape { packs: 24_000, ..few };
    if asked_for() > 0 {
        let shape = Shape {
            packs: asked_for() * 1_000_000 / many.chunks_per_pack,
            ..many
        };
        let peak = measured(shape)?.peak;
        ensure!(peak <= MOST, "{peak} bytes");
        return Ok(());
    }
    let all = std::thread::scope(|scope| {
        [few, many, spread]
            .map(|shape| scope.spawn(move || measured(shape)))
            .map(|thread| thread.join().unwrap())
    });
    let [few, many, widely] = all;
    let (few, many, widely) = (few?.peak, many?.peak, widely?.peak);
    let grown = many.saturating_sub(few);
    ensure!(
        grown <= FOR_RUNS,
        "four times the chunks in as many packs: {grown} bytes more"
    );
    let grown = widely.saturating_sub(few) / (spread.packs - 8_000);
    println!("{grown} bytes a pack");
    ensure!(grown <= PER_PACK, "{grown} bytes a pack");
    Ok(())
}
