use super::*;

#[test]
fn all_that_kv_depends_on_changes_where_the_keys_of_shared_pages_begin() {
    let shape = KvShape { layers: 2, kv_heads: 4, head_dim: 16, dtype: KvDtype::Bf16 };
    let root = |model: u8, shape, page| prefix_root(&[model; 32], &shape, page);
    let base = root(1, shape, 256);
    assert_eq!(base, root(1, shape, 256));
    let others = [
        root(2, shape, 256),
        root(1, shape, 64),
        root(1, KvShape { layers: 3, ..shape }, 256),
        root(1, KvShape { kv_heads: 16, ..shape }, 256),
        root(1, KvShape { head_dim: 4, ..shape }, 256),
        root(1, KvShape { kv_heads: 16, head_dim: 4, ..shape }, 256),
        root(1, KvShape { dtype: KvDtype::F32, ..shape }, 256),
    ];
    for (i, other) in others.iter().enumerate() {
        assert!(*other != base && others[i + 1..].iter().all(|later| later != other), "case {i}");
    }
}
