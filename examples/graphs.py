"""Molecules as padded batches of graphs: RDKit reads the atoms and bonds of a SMILES string."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shared.data import DataError

ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
SMILES, TARGET = "smiles", "measured log solubility in mols per litre"


class Graphs(NamedTuple):
    """atoms (B, N, K): features, 0 where there is no atom. neighbours (B, N, N), bool: bonds, and every atom itself, so that
    padding has somewhere to look, too. real (B, N, 1): 1 for an atom, 0 for padding."""

    atoms: Tensor
    neighbours: Tensor
    real: Tensor


@dataclass(frozen=True)
class Molecules:
    """All of them, padded to the largest; sizes and targets (molecules,)."""

    graphs: Graphs
    sizes: Tensor
    targets: Tensor

    @property
    def features(self) -> int:
        return self.graphs.atoms.shape[-1]

    def batch(self, rows: Tensor, device: str) -> Graphs:
        """These molecules, padded to the largest of them."""
        n = int(self.sizes[rows].max())
        atoms, neighbours, real = self.graphs
        return Graphs(atoms[rows, :n].to(device), neighbours[rows, :n, :n].to(device), real[rows, :n].to(device))


def read(path: Path) -> Molecules:
    """From a CSV file with SMILES strings and log solubilities. Raises DataError, without RDKit too."""
    try:
        from rdkit import Chem
    except ImportError as error:
        raise DataError(f"the molecules need RDKit, which cannot be imported ({error}): pip install rdkit") from error
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = []
    for line, row in enumerate(rows, start=2):
        molecule = Chem.MolFromSmiles(row[SMILES])
        if molecule is None:
            raise DataError(f"{path}, line {line}: expected a SMILES string that RDKit reads, got {row[SMILES]!r}")
        found.append(molecule)
    sizes = torch.tensor([molecule.GetNumAtoms() for molecule in found])
    n = int(sizes.max())
    atoms = torch.stack([_padded([_features(atom) for atom in molecule.GetAtoms()], n) for molecule in found])
    neighbours = torch.eye(n, dtype=torch.bool).repeat(len(found), 1, 1)
    for graph, molecule in zip(neighbours, found, strict=True):
        for bond in molecule.GetBonds():
            ends = [bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]
            graph[ends, ends[::-1]] = True
    real = (torch.arange(n) < sizes[:, None])[..., None].float()
    targets = torch.tensor([float(row[TARGET]) for row in rows])
    return Molecules(Graphs(atoms, neighbours, real), sizes, targets)


def _features(atom: Any) -> list[float]:
    """What RDKit knows of an atom, one feature for each value, and how many bonds of each kind it has."""
    kinds = [str(bond.GetBondType()) for bond in atom.GetBonds()]
    return [
        *_one_of(atom.GetSymbol(), ELEMENTS),
        *_one_of(atom.GetDegree(), range(5)),
        *_one_of(atom.GetTotalNumHs(), range(4)),
        *_one_of(str(atom.GetHybridization()), ("SP", "SP2", "SP3")),
        float(atom.GetFormalCharge()),
        float(atom.GetIsAromatic()),
        float(atom.IsInRing()),
        *(float(kinds.count(kind)) for kind in BONDS),
    ]


def _one_of(value: object, known: Sequence[object]) -> list[float]:
    """1 at its place; the last place is for all others."""
    return [float(value == name) for name in known] + [float(value not in known)]


def _padded(rows: list[list[float]], n: int) -> Tensor:
    return torch.cat([torch.tensor(rows), torch.zeros(n - len(rows), len(rows[0]))])
