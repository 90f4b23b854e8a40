//! What goes into products: the squares of their inputs, summed by column. They say how much an error of a weight counts.
//!
//! Sums run over the rows in the order in which they are computed, in f64: their bits depend on the rows alone, not on threads, instructions
//! or the steps in which the rows came.

use std::collections::BTreeMap;

use plan::model::TensorId;

/// Of the input of one matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ColumnSquares {
    /// Sums of squares, `[k]`.
    pub sums: Vec<f64>,
    /// Rows that went in.
    pub rows: u64,
}

/// Of the inputs of all matrices that were multiplied with.
pub type Observed = BTreeMap<TensorId, ColumnSquares>;

/// Adds rows of `k` values, `[rows, k]`, that go into the product with `id`.
pub(crate) fn add(observed: &mut Observed, id: TensorId, k: usize, x: &[f32]) {
    let columns = observed.entry(id).or_insert_with(|| ColumnSquares { sums: vec![0.0; k], rows: 0 });
    for row in x.chunks_exact(k) {
        for (sum, x) in columns.sums.iter_mut().zip(row) {
            *sum += f64::from(*x) * f64::from(*x);
        }
        columns.rows += 1;
    }
}

#[cfg(test)]
mod tests {
    use plan::model::Role;

    use super::*;

    #[test]
    fn sums_run_over_rows_in_order() {
        let (a, b) = (TensorId { layer: Some(0), role: Role::Q }, TensorId { layer: Some(1), role: Role::ExpertUp(3) });
        let mut observed = Observed::new();
        add(&mut observed, a, 2, &[1.0, 2.0, 3.0, -4.0]);
        add(&mut observed, b, 3, &[0.5, 0.0, 1e20]);
        add(&mut observed, a, 2, &[0.1, 0.0]);
        add(&mut observed, a, 2, &[]);
        let tenth = f64::from(0.1_f32);
        assert_eq!(observed[&a], ColumnSquares { sums: vec![1.0 + 9.0 + tenth * tenth, 20.0], rows: 3 });
        assert_eq!(observed[&b], ColumnSquares { sums: vec![0.25, 0.0, f64::from(1e20_f32) * f64::from(1e20_f32)], rows: 1 });
    }
}
