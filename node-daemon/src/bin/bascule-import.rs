//! `bascule-import`: fills one disk of a volume from an image. Started by `bascule-node`.

fn main() -> std::process::ExitCode {
    bascule_node::import_main()
}
