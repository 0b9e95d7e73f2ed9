"""Another set of golden numbers: the same files and keys, other sizes and seeds, by published definitions.

`python tests/other_golden.py folder` makes it, in loops and dense matrices that share no line with the
package. It says nothing about the original (that is what tests/golden is for); it shows that test_golden.py
assumes no size. What no short definition gives (regions of RMAC, RANSAC's random streams) is a part of the
committed set.
"""

import bisect
import math
import sys
from pathlib import Path

import numpy as np
import scipy.sparse.linalg as sla
import torch
import torch.nn.functional as F

HOME = Path(__file__).parent / "golden"


def f32(x):
    return np.asarray(x.detach() if torch.is_tensor(x) else x, np.float32)


def unit(x):
    return f32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def flat(rows, kind=np.int64):
    return (np.concatenate([np.asarray(r, kind) for r in rows]), np.r_[0, np.cumsum([len(r) for r in rows])])


def top(q, x, k):
    "The k nearest rows of x, and their similarities."
    s = q.astype(np.float64) @ x.T
    i = np.argsort(-s, 1, kind="stable")[:, :k]
    return f32(np.take_along_axis(s, i, 1)), i


def clustered(rng, n, d, centres, noise):
    return unit(centres[rng.integers(0, len(centres), n)] + noise * rng.normal(size=(n, d)))


def losses(rng, b=21, c=43, d=48):
    out = dict(
        features=f32(rng.normal(size=(b, d))),
        weight=f32(rng.normal(size=(c, d))),
        labels=rng.integers(0, c, b),
        features2=f32(rng.normal(size=(b, d))),
    )
    out["features"][0] = -3 * out["weight"][out["labels"][0]] + 0.9 * rng.normal(size=d)
    labels = torch.as_tensor(out["labels"])
    hot = F.one_hot(labels, c).double()

    def both(x):
        return torch.tensor(out[x].astype(np.float64), requires_grad=True), torch.tensor(
            out["weight"].astype(np.float64), requires_grad=True
        )

    def cosine(x, w):
        return F.normalize(x) @ F.normalize(w).T

    def keep(key, logits, x, w, call="", grads=True):
        ce = -(logits.log_softmax(1) * hot).sum(1).mean()
        out[f"{key}_logits{call}"] = f32(logits)
        if not grads:
            return
        out[f"{key}_ce{call}"], (out[f"{key}_gfeat{call}"], out[f"{key}_gweight{call}"]) = (
            f32(ce),
            map(f32, torch.autograd.grad(ce, (x, w))),
        )

    def arc(cos, m, easy=False):
        phi = cos * math.cos(m) - (1 - cos**2).sqrt() * math.sin(m)
        return (
            torch.where(cos > 0, phi, cos)
            if easy
            else torch.where(cos > math.cos(math.pi - m), phi, cos - m * math.sin(math.pi - m))
        )

    x, w = both("features")
    out["cosine"] = f32(cosine(x, w))
    soft = hot * 0.9 + 0.1 / c
    for key, f, mask in (
        ("arc_s30_m03", lambda v: arc(v, 0.3), hot),
        ("arc_s30_m03_easy", lambda v: arc(v, 0.3, True), hot),
        ("arc_s30_m03_ls01", lambda v: arc(v, 0.3), soft),
        ("cos_s30_m035", lambda v: v - 0.35, hot),
        ("cos_default", lambda v: v - 0.4, hot),
    ):
        v = cosine(x, w)
        keep(key, 30 * (mask * f(v) + (1 - mask) * v), x, w)
    for name, theta in (("tz125", 1.25), ("tzpi4", math.pi / 4)):
        for m, mname, mask, calls in ((0.0, "m00", hot, 2), (0.5, "m05", hot, 2), (0.5, "m05_ls01", soft, 1)):
            if mname.endswith("ls01") and name != "tzpi4":
                continue
            s = t = math.log(c - 1) / math.cos(theta)
            key = f"ada_{name}_{mname}"
            if calls == 2:
                out[f"{key}_s0"] = f32(s)
            for call in range(1, calls + 1):
                x, w = both("features" if call == 1 else "features2")
                v = cosine(x, w).clamp(-1 + 1e-7, 1 - 1e-7)
                angle = v.arccos()

                def B(s):
                    return torch.where(mask < 1, (s * v).exp(), 0).sum().item() / b

                t = math.log(B(t)) / math.cos(min(theta, angle[hot > 0].median().item()))
                s = math.log(B(s)) / math.cos(min(theta, angle.median().item()))
                out[f"{key}_s{call}"] = f32(s)
                keep(key, s * (mask * (angle + m).cos() + (1 - mask) * v), x, w, str(call), calls == 2)
                if mname == "m00":
                    out[f"textbook_ada_{name}_s{call}"] = f32(t)
    out["trip_emb"], out["trip_labels"] = unit(rng.normal(size=(b, d))), np.r_[np.arange(b - 1) % 5, 9]
    for m in (0.1, 0.3):
        for dist in ("eu", "sq"):
            for kind in ("hard", "all"):
                e = torch.tensor(out["trip_emb"].astype(np.float64), requires_grad=True)
                y = out["trip_labels"]

                def D(i, j):
                    return (e[i] - e[j]).square().sum() if dist == "sq" else (e[i] - e[j]).norm()

                pos, neg = (
                    [[j for j in range(b) if j != i and y[j] == y[i]] for i in range(b)],
                    [[j for j in range(b) if y[j] != y[i]] for i in range(b)],
                )

                def far(i):
                    return max(
                        (D(i, j) for j in pos[i]), default=torch.zeros(()).double(), key=lambda v: v.item()
                    )

                def hard(m):
                    return torch.stack(
                        [
                            F.relu(far(i) - min((D(i, j) for j in neg[i]), key=lambda v: v.item()) + m)
                            for i in range(b)
                        ]
                    ).mean()

                if kind == "hard":
                    value = hard(0.1)
                else:
                    terms = torch.stack(
                        [F.relu(D(i, p) - D(i, n) + m) for i in range(b) for p in pos[i] for n in neg[i]]
                    )
                    value = terms.sum() / (terms > 1e-16).sum()
                key = f"trip_{kind}_m0{int(m * 10)}_{dist}"
                out[key], out[f"{key}_g"] = f32(value), f32(torch.autograd.grad(value, e)[0])
                if (kind, dist, m) == ("hard", "eu", 0.3):
                    out["textbook_trip_hard_m03_eu"] = f32(hard(0.3))
    n, size = 4, 6
    out["tuple_x"], out["tuple_label"] = (
        unit(rng.normal(size=(n * size, d))).T.copy(),
        f32([-1, 1, *[0] * (size - 2)] * n),
    )
    for key, m in (
        ("contrastive_m07", 0.7),
        ("contrastive_m085", 0.85),
        ("contrastive_m12", 1.2),
        ("cirtriplet_m01", 0.1),
        ("cirtriplet_m05", 0.5),
    ):
        e = torch.tensor(out["tuple_x"].astype(np.float64), requires_grad=True)
        value = 0
        for a in range(0, n * size, size):
            q, p = e[:, a], e[:, a + 1]
            if key.startswith("con"):
                value = value + 0.5 * (q - p + 1e-6).norm() ** 2
            for j in range(a + 2, a + size):
                value = value + (
                    0.5 * F.relu(m - (q - e[:, j] + 1e-6).norm()) ** 2
                    if key.startswith("con")
                    else F.relu((q - p).square().sum() - (q - e[:, j]).square().sum() + m)
                )
        out[key], out[f"{key}_g"] = f32(value), f32(torch.autograd.grad(value, e)[0])
    return out


def pooling(rng):
    "The second image of each map; power law and batch norm anew."
    out = dict(np.load(HOME / "pooling.npz"))
    for k in out:
        if k.endswith(("_wide", "_tall")) and out[k].ndim > 1:
            out[k] = out[k][1:]
    x, p = (
        torch.tensor(out["x_wide"].astype(np.float64), requires_grad=True),
        torch.tensor([3.0], dtype=torch.float64, requires_grad=True),
    )
    out["gem_gradv"] = f32(rng.normal(size=out["gem_gradv"][1:].shape))
    g = x.clamp(min=1e-6).pow(p).mean((2, 3)).pow(1 / p)
    y = g / (g.norm(dim=1, keepdim=True) + 1e-6)
    out["gem_l2n_wide"] = f32(y)
    out["gem_l2n_gx"], out["gem_l2n_gp"] = map(
        f32, torch.autograd.grad((torch.as_tensor(out["gem_gradv"]) * y).sum(), (x, p))
    )
    v = out["vec"] = f32(rng.normal(size=(4, 19)))
    v[1] = 0
    out["l2n"], out["powerlaw_fixed"] = (
        f32(v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-6)),
        f32(np.sign(v + 1e-6) * np.sqrt(np.abs(v + 1e-6))),
    )
    c = 7
    w, b, m, s = (
        f32(a)
        for a in (
            rng.normal(size=c),
            rng.normal(size=c),
            rng.normal(size=c),
            np.r_[1e-4, rng.uniform(0.5, 2, c - 1)],
        )
    )
    out |= dict(bn_weight=w, bn_bias=b, bn_mean=m, bn_var=s, bn_x=f32(rng.normal(size=(2, c, 3, 6))))

    def norm(eps):
        return f32(
            (
                (out["bn_x"].astype(np.float64).transpose(0, 2, 3, 1) - m)
                / np.sqrt(s.astype(np.float64) + eps)
                * w
                + b
            ).transpose(0, 3, 1, 2)
        )

    return out | dict(bn_eval=norm(1e-5), bn_frozen=norm(0))


def whiten(rng, d=17, n=260, p=190):
    X = f32(rng.normal(size=(d, d)) @ rng.normal(size=(d, n)) + 2)
    Y = X.astype(np.float64)
    q, r = rng.integers(0, n, p), rng.integers(0, n, p)

    def finish(m, P, pre):
        y = P @ (Y - m)
        y, h = y / (np.linalg.norm(y, axis=0) + 1e-6), y[: d // 2]
        h = h / (np.linalg.norm(h, axis=0) + 1e-6)
        return {
            f"{pre}_m": f32(m),
            f"{pre}_P": f32(P),
            f"{pre}_apply": f32(y),
            f"{pre}_apply_half": f32(h),
            f"{pre}_gram_half": f32(h[:, :25].T @ h[:, :25]),
        }

    def directions(C):
        v, u = np.linalg.eigh(C)
        return v[::-1], u.T[::-1]

    m = Y.mean(1, keepdims=True)
    v, u = directions((Y - m) @ (Y - m).T / n)
    P = u / np.sqrt(v)[:, None]
    S = (Y[:, q] - Y[:, r]) @ (Y[:, q] - Y[:, r]).T / p
    P0 = np.linalg.inv(np.linalg.cholesky(S))
    mq = Y[:, q].mean(1, keepdims=True)
    Z = P0 @ (Y - mq)
    w = directions(Z @ Z.T)[1] @ P0
    wrong = np.linalg.eigh(np.cov(Y, bias=True))[1][::-1] / np.sqrt(v)[:, None]
    bad = (Y - m).T @ wrong.T
    return (
        dict(
            X=X,
            qidxs=q,
            pidxs=r,
            orig_wpca_m=f32(m[:, 0]),
            orig_wpca_P=f32(wrong),
            orig_wpca_apply=f32(bad),
            orig_wpca_cov=f32(np.cov(bad.T, bias=True)),
            fixed_wpca_P=f32(P),
            fixed_wpca_apply=f32((P @ (Y - m)).T),
            eigvals=f32(v),
        )
        | finish(mq, w, "lw")
        | finish(m, P, "pca")
    )


def metrics(rng, q=31, n=260):
    out = dict(
        map_true=rng.integers(0, 9, q),
        map_pred=rng.integers(0, 9, (q, 120)),
        kaggle_retrieved=np.stack([rng.permutation(n)[:130] for _ in range(q)]),
    )
    for k in (100, 20):
        out[f"map_at_{k}"] = f32(
            np.mean(
                [
                    sum((row[: i + 1] == t).mean() for i in range(k) if row[i] == t) / k
                    for row, t in zip(out["map_pred"], out["map_true"])
                ]
            )
        )
    rel = [rng.permutation(n)[: rng.integers(1, 200)] for _ in range(q)]
    out["kaggle_rel"], out["kaggle_rel_off"] = flat(rel)
    aps = []
    for row, r in zip(out["kaggle_retrieved"], map(set, rel)):
        aps.append(
            sum(len(set(row[: i + 1]) & r) / (i + 1) for i in range(100) if row[i] in r) / min(len(r), 100)
        )
    out |= dict(textbook_kaggle_ap=f32(aps), textbook_kaggle_map=f32(np.mean(aps)))
    for name, m in (("gap", 170), ("gap2", 90)):
        pred, true, conf = rng.integers(-1, 6, m), rng.integers(-1, 6, m), f32(rng.permutation(m) / m)
        hits = total = 0
        for i, j in enumerate(np.argsort(-conf), 1):
            if pred[j] == true[j] >= 0:
                hits += 1
                total += hits / i
        out |= {
            f"{name}_pred": pred,
            f"{name}_conf": conf,
            f"{name}_true": true,
            name: f32(total / (true >= 0).sum()),
        }
    out |= dict(acc_logits=f32(rng.normal(size=(40, 7))), acc_labels=rng.integers(0, 7, 40))
    out["acc"] = f32((out["acc_logits"].argmax(1) == out["acc_labels"]).mean())
    size, nq, trunc, kappas = 150, 9, 70, (1, 4, 15)
    ranks, kinds = (
        np.stack([rng.permutation(size) for _ in range(nq)], 1),
        rng.choice(4, (nq, size), p=[0.75, 0.1, 0.08, 0.07]),
    )
    kinds[0][kinds[0] == 1] = 0
    lists = {
        x: [np.flatnonzero(row == i) for row in kinds] for i, x in enumerate(("easy", "hard", "junk"), 1)
    }
    for x, rows in lists.items():
        out[f"rop_{x}"], out[f"rop_{x}_off"] = flat(rows)

    def judged(ranks, good, bad):
        aps, pks = [], []
        for i in range(nq):
            ok, junk = (set(np.concatenate([lists[x][i] for x in xs]) if xs else []) for xs in (good, bad))
            at = [j for j, x in enumerate([x for x in ranks[:, i] if x not in junk]) if x in ok]
            if not ok:
                aps.append(-1)
                pks.append([-1] * 3)
                continue
            aps.append(sum(((j / r if r else 1) + (j + 1) / (r + 1)) / 2 / len(ok) for j, r in enumerate(at)))
            last = max(at) + 1
            pks.append([sum(r < min(last, k) for r in at) / min(last, k) for k in kappas])
        aps, pks = np.array(aps), np.array(pks)
        seen = aps >= 0
        return aps, pks, aps[seen].mean(), pks[seen].mean(0)

    out |= dict(rop_ranks=ranks, rop_kappas=np.array(kappas), rop_trunc=np.array(trunc))
    for name, good, bad, cut in (
        ("E", ["easy"], ["junk", "hard"], size),
        ("M", ["easy", "hard"], ["junk"], size),
        ("H", ["hard"], ["junk", "easy"], size),
        ("nojunk", ["easy", "hard"], [], size),
        ("trunc", ["easy", "hard"], ["junk"], trunc),
    ):
        aps, pks, mean, mpk = judged(ranks[:cut], good, bad)
        out |= {f"rop_{name}_ap": f32(aps), f"rop_{name}_map": f32(mean), f"rop_{name}_mpk": f32(mpk)}
        if len(name) == 1:
            out[f"rop_{name}_pk"] = f32(pks)
    cases = [np.sort(rng.permutation(40)[:k]) for k in (1, 3, 9, 20, 5)]
    nres = np.array([1, 5, 9, 25, 8])
    out["ap_ranks"], out["ap_off"] = flat(cases)
    return out | dict(
        ap_nres=nres,
        ap=f32(
            [
                sum(((j / r if r else 1) + (j + 1) / (r + 1)) / 2 / m for j, r in enumerate(c))
                for c, m in zip(cases, nres)
            ]
        ),
    )


def qe_dba(rng, q=18, n=110, d=24, k=14, m=8, alpha=3.0):
    Q, X = (
        clustered(rng, q, d, rng.normal(size=(9, d)), 0.8),
        clustered(rng, n, d, rng.normal(size=(9, d)), 0.8),
    )
    U = np.concatenate([Q, X])
    sims, idx = top(U, U, k)
    out = dict(feats_test=Q, feats_index=X, sims=sims, topk_idx=idx, alpha=f32(alpha), n_qe=np.array(m))

    def mix(base, s, i, a=alpha):
        return unit((np.maximum(s, 0).astype(np.float64)[..., None] ** a * base[i].astype(np.float64)).sum(1))

    whole, rows = mix(U, sims[:, :m], idx[:, :m]), mix(U, sims[:m], idx[:m])
    for which in ("qe", "dba", "both"):
        for pre, x in (("fixed", whole), ("orig", rows)):
            out |= {
                f"{pre}_{which}_test": x[:q] if which != "dba" else Q,
                f"{pre}_{which}_index": x[q:] if which != "qe" else X,
            }

    def plus(q, x, s, i, a=alpha):
        return unit(q + (s.astype(np.float64)[..., None] ** a * x[i].astype(np.float64)).sum(1))

    s, i = top(Q, X, m)
    out |= dict(
        textbook_nb_test=i,
        textbook_nb_sims=s,
        textbook_qe_test=plus(Q, X, np.maximum(s, 0), i),
        textbook_aqe5_test=plus(Q, X, np.ones((q, 5)), i[:, :5]),
    )
    S = X.astype(np.float64) @ X.T
    np.fill_diagonal(S, -9)
    j = np.argsort(-S, 1)[:, :m]
    D = plus(X, X, np.maximum(np.take_along_axis(S, j, 1), 0), j)
    s, i = top(Q, D, m)
    return out | dict(
        textbook_nb_index=j, textbook_dba_index=D, textbook_dba_then_qe_test=plus(Q, D, np.maximum(s, 0), i)
    )


def egt(rng, q=17, n=310, d=20, length=70):
    centres = rng.normal(size=(12, d))
    X, Q = clustered(rng, n, d, centres, 0.7), clustered(rng, q, d, centres, 0.7)
    qs, qi = top(Q, X, 90)
    s, i = top(X, X, 90)

    def walk(row, t, k):
        table, found, new = {}, [], [-1]
        while True:
            for v in new:
                for x, value in zip(
                    (qi[row] if v < 0 else i[v])[:k].tolist(), (qs[row] if v < 0 else s[v])[:k]
                ):
                    if x not in found:
                        table[x] = max(table.get(x, 0), float(value))
            new = []
            while table and len(found) < length:
                best = max(table, key=table.get)
                if new and not table[best] > t:
                    break
                above = table.pop(best) > t
                found.append(best)
                new.append(best)
                if not above:
                    break
            if len(found) == length:
                return found
            if not table:
                return None

    out = dict(ti_sims=qs, ti_ids=qi, ii_sims=s, ii_ids=i, feats_test=Q, feats_index=X)
    runs = {}
    for key, t, k in (
        ("out_inf", 1e9, 100),
        ("out_inf_k50", 1e9, 50),
        ("out_t06", 0.6, 100),
        ("out_t08", 0.8, 100),
        ("out_t06_k20", 0.6, 20),
        ("out_t08_k20", 0.8, 20),
    ):
        runs[key] = [walk(r, t, k) for r in range(q)]
    whole = [
        r for r in range(q) if all(v[r] for v in runs.values())
    ]  # the original stops with an error at the others
    return {k: v[whole] if k.startswith(("ti_", "feats_t")) else v for k, v in out.items()} | {
        k: np.array([v[r] for r in whole]) for k, v in runs.items()
    }


def diffusion(rng, n=230, nq=21, d=20, kd=24, t=90):
    def solve(x, kd, t):
        sims, ids = top(x, x, t)
        A = np.zeros((len(x),) * 2)
        for a in range(len(x)):
            for b, s in zip(ids[a, :kd], sims[a, :kd].astype(np.float64)):
                if a != b and a in ids[b, :kd]:
                    A[a, b] = max(s, 0) ** 3
        D = (A.sum(1) + 1e-12) ** -0.5
        L = np.eye(len(x)) - 0.99 * D[:, None] * A * D
        offline, missed = np.zeros((len(x), t)), 0
        for a in range(len(x)):
            e = np.zeros(t)
            e[0] = 1
            offline[a], info = sla.cg(L[np.ix_(ids[a], ids[a])], e, x0=np.zeros(t), rtol=1e-6, maxiter=20)
            missed += info != 0
        return sims[:, :kd], ids, A, L, offline, missed

    x = clustered(rng, n, d, rng.normal(size=(8, d)), 0.9)
    sims, ids, A, L, off, missed = solve(x, kd, t)
    dense = np.zeros((n, n))
    np.put_along_axis(dense, ids, off, 1)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    scores = dense[:nq] @ dense[nq:].T
    out = dict(
        feats=x,
        n_query=np.array(nq),
        kd=np.array(kd),
        n_trunc=np.array(t),
        knn_sims=sims,
        knn_ids=ids,
        offline=f32(off),
        cg_unconverged=np.array(missed),
        rank_scores=f32(scores),
        rank_top100=np.argsort(-scores, 1, kind="stable")[:, :60],
    )
    for name, M in (("aff", A), ("lap", L)):
        r, c = np.nonzero(M)
        out |= {f"{name}_row": r, f"{name}_col": c, f"{name}_val": f32(M[r, c])}
    _, gids, _, _, goff, _ = solve(x[nq:], kd, t)
    inside = np.zeros((n - nq,) * 2)
    np.put_along_axis(inside, gids, goff, 1)
    s, i = top(x[:nq], x[nq:], 10)
    out["old_scores"] = f32(
        [sum(max(b, 0) ** 3 * inside[a] for a, b in zip(row, v)) for row, v in zip(i, s.astype(np.float64))]
    )
    a = np.sort(rng.uniform(0, 2 * np.pi, 130))
    ring = unit(np.c_[np.cos(a), np.sin(a), np.cos(2 * a), np.sin(2 * a), 0.03 * rng.normal(size=(130, 5))])
    sims, ids, _, _, off, missed = solve(ring, 7, 80)
    return out | dict(
        ring_feats=ring,
        ring_kd=np.array(7),
        ring_n_trunc=np.array(80),
        ring_knn_sims=sims,
        ring_knn_ids=ids,
        ring_offline=f32(off),
        ring_cg_unconverged=np.array(missed),
    )


def rerank(rng, q=33, n=640, t=410, d=24, k=3):
    centres = rng.normal(size=(15, d))

    def draw(m):
        return rng.integers(0, 15, m)

    def at(label, noise=0.7):
        return unit(centres[label] + noise * rng.normal(size=(len(label), d)))

    lq, lx, lt = draw(q), np.where(np.arange(n) < n // 5, -1, draw(n)), draw(t)
    Q, X, T = at(lq), at(np.maximum(lx, 0)), at(lt)
    X[lx < 0] = unit(rng.normal(size=(n // 5, d)))
    names = 100 + 7 * np.arange(15)
    out = dict(
        feats_query=Q,
        feats_index=X,
        feats_train=T,
        train_landmark=names[lt],
        true_landmark_query=names[lq],
        true_landmark_index=np.where(lx < 0, -1, names[lx]),
        voting_k=np.array(k),
    )
    out |= {
        f"ids_{a}": np.array([f"{a}{i:04d}" for i in range(m)])
        for a, m in (("query", q), ("index", n), ("train", t))
    }
    for a, x in (("query", Q), ("index", X)):
        votes = [{} for _ in x]
        for v, row, s in zip(votes, *top(x, T, k)[::-1]):
            for j, value in zip(row, s.astype(np.float64)):
                v[names[lt[j]]] = v.get(names[lt[j]], 0) + value
        out |= {
            f"pred_{a}_landmark": np.array([max(v, key=v.get) for v in votes]),
            f"pred_{a}_score": f32([max(v.values()) / k for v in votes]),
        }
    base = out["baseline_top100"] = top(Q, X, 100)[1]
    ql, qs, xl, xs = (out[f"pred_{a}_{b}"] for a in ("query", "index") for b in ("landmark", "score"))
    for th in (0.6, 0.4):
        for size in (100, 50):
            lists, inserted, positive = [], [], []
            for row, label, s in zip(base[:, :size], ql, qs):
                same = [x for x in row if xl[x] == label]
                more = sorted(
                    (x for x in range(n) if xl[x] == label and x not in row and s + xs[x] > np.float32(th)),
                    key=lambda x: -xs[x],
                )
                lists.append((same + more + [x for x in row if xl[x] != label])[:size])
                inserted.append(len(more))
                positive.append(len(same))
            out |= {
                f"{p}_t0{int(th * 10)}_k{size}": np.array(v)
                for p, v in (("rerank", lists), ("n_insert", inserted), ("n_pos", positive))
            }
    return out


def recognition(rng, q=150, t=210, d=20):
    names = np.array([7, 107, 1017, 52, 852, 33, 90, 411])
    lt = rng.choice(8, t, p=[0.3, 0.1, 0.1, 0.2, 0.1, 0.1, 0.05, 0.05])
    centres = rng.normal(size=(8, d))
    T, X = (
        unit(centres[lt] + 0.8 * rng.normal(size=(t, d))),
        unit(
            centres[rng.choice(8, q, p=[0.35, 0.1, 0.1, 0.25, 0.05, 0.05, 0.05, 0.05])]
            + 0.8 * rng.normal(size=(q, d))
        ),
    )
    sims, idx = top(X, T, 3)
    dists = f32(2 - 2 * sims.astype(np.float64))
    pairs = [
        (i, j, rng.integers(0, 150))
        for i in range(q)
        for j in {*idx[i], *rng.integers(0, t, 1)}
        if rng.random() < 0.7
    ]
    a, b, c = map(np.array, zip(*pairs))
    table = {(i, j): n for i, j, n in pairs}
    labels, scores = [], []
    for i in range(q):
        v = {}
        for j, dist in zip(idx[i], dists[i].astype(np.float64)):
            v[names[lt[j]]] = v.get(names[lt[j]], 0) + 1 - dist + min(70, table.get((i, j), 0)) / 70
        labels.append(max(v, key=v.get))
        scores.append(max(v.values()))
    labels, scores = np.array(labels), f32(scores)
    out = dict(
        feats_test=X,
        feats_train=T,
        ids_test=np.array([f"t{i}" for i in range(q)]),
        ids_train=np.array([f"u{i}" for i in range(t)]),
        train_landmark=names[lt],
        topk_idx=idx,
        dists=dists,
        ransac_test=a,
        ransac_train=b,
        ransac_inliers=c,
        pred_landmark=labels,
        pred_score=scores,
    )
    for most in (30, 6):
        names, n = np.unique(labels, return_counts=True)
        banned = names[n > most][np.argsort(-n[n > most], kind="stable")]
        count = dict(zip(names, n))
        text, wrong, ws = [f"{x} " for x in labels], labels.copy(), scores.copy()
        for x in banned:
            for i in range(q):
                if f"{x} " in text[i]:
                    text[i], wrong[i], ws[i] = f"{x} ", x, -count[x]
        exact = f32([-count[x] if x in banned else s for x, s in zip(labels, scores)])
        out |= {
            f"ban{most}_{k}": v
            for k, v in dict(
                orig_order=np.argsort(-scores, kind="stable"),
                orig_landmark=wrong,
                orig_score=ws,
                exact_landmark=labels,
                exact_score=exact,
                banned=banned,
            ).items()
        }
    return out


def ransac(rng, true=17, false=11):
    out = dict(np.load(HOME / "ransac.npz"))
    n = int(out["is_true"].sum())
    keep = np.r_[np.arange(true), n + np.arange(false)]
    for k in ("affine", "planted", "oracle_inliers"):
        out[k] = out[k][:true]
    for k in ("match_1", "match_2"):
        out[k], off = flat([out[k][a:b] for a, b in zip(out["match_off"][keep], out["match_off"][keep + 1])])
    return (
        out
        | {
            k: out[k][keep]
            for k in ("pairs", "is_true", "n_tentative", "n_correct", "inliers", "inliers_seeds")
        }
        | dict(match_off=off)
    )


def cleaning(rng):
    g = dict(np.load(HOME / "cleaning.npz"))
    keep = np.flatnonzero(rng.permutation(g["landmark"].max() + 1)[g["landmark"]] % 3 > 0)
    new = np.full(len(g["landmark"]), -1)
    new[keep] = np.arange(len(keep))
    use = new[g["match_query"]] >= 0
    label = g["landmark"][keep]
    q, n = new[g["match_query"]][use], g["match_inliers"][use]
    out = dict(
        image_ids=g["image_ids"][keep],
        landmark=label,
        match_query=q,
        match_target=new[g["match_target"]][use],
        match_inliers=n,
    )

    def rule(v, f):
        count = [0] * len(keep)
        for a, c in zip(q, n):
            count[a] += c >= v
        passed = {}
        for a, c in enumerate(count):
            if c >= f:
                passed.setdefault(label[a], []).append(a)
        alone = sum(len(x) for x in passed.values() if len(x) < 2)
        return {name: passed[name] for name in sorted(passed) if len(passed[name]) > 1}, alone

    for v, f in ((30, 3), (20, 2), (50, 5)):
        kept, alone = rule(v, f)
        rows, off = flat([sorted(r, key=lambda a: out["image_ids"][a]) for r in kept.values()])
        out |= {
            f"v{v}_f{f}_{k}": x
            for k, x in dict(
                landmark=np.array(list(kept)), image=rows, off=off, n_singleton=np.array(alone)
            ).items()
        }
    return out | dict(
        grid_counts=np.array(
            [
                [(len(k), sum(map(len, k.values()))) for f in range(1, 11) for k in [rule(v, f)[0]]]
                for v in range(20, 51, 5)
            ]
        )
    )


def batching(rng, n=131, size=6):
    g = dict(np.load(HOME / "batching.npz"))
    h, w = rng.integers(200, 900, (2, n))
    bins = {5: (0.67, 0.77, 1.33, 1.5), 3: (0.77, 1.33)}
    order = rng.permutation(n)
    out = {k: g[k] for k in ("bins5", "bins3", "scales", "n_groups", "size_wh")} | dict(
        height=h,
        width=w,
        order_full=order,
        order_part=order[:83],
        batch_size=np.array(size),
        edge_ratio=f32([0.67, 0.77, 1.33, 1.5, 0.5, 1.0, 2.0]),
    )
    for k, b in bins.items():
        gid = out[f"gid{k}"] = np.array([bisect.bisect_right(b, x / y) for x, y in zip(h, w)])
        out[f"edge_gid{k}"] = np.array(
            [bisect.bisect_right(b, r) for r in (0.67, 0.77, 1.33, 1.5, 0.5, 1.0, 2.0)]
        )
        for name in ("full", "part"):
            piles, batches = {}, []
            for i in out[f"order_{name}"].tolist():
                if len(piles.setdefault(gid[i], [[]])[-1]) == size:
                    piles[gid[i]].append([])
                if not piles[gid[i]][-1]:
                    batches.append(piles[gid[i]][-1])
                piles[gid[i]][-1].append(i)
            for rule in ("keep", "drop"):
                key = f"{name}_g{k}_{rule}"
                out[key], out[f"{key}_off"] = flat([b for b in batches if rule == "keep" or len(b) == size])
    return out


def extract(rng, n=15):
    hw, scales = rng.integers(20, 1200, (29, 2)), ((0.75, 1.0, 1.25), (2**-0.5, 1.0, 2**0.5))

    def side(x, s, least):
        return max(least, int(x * s // 32) * 32)

    ids, out = (
        np.array([f"{i:04d}" for i in rng.permutation(n)]),
        dict(hw=hw, predict_scales=f32(scales[0]), eval_scales=f32(scales[1]), weights=f32([0.5, 1.0, 0.25])),
    )
    for key, ss, least in (("predict_size", scales[0], 128), ("eval_size", scales[1], 0)):
        out[key] = np.array([[[side(x, s, least) for x in row] for s in ss] for row in hw.tolist()])
    feats = [rng.normal(size=(n, d)) for d in (9, 14, 6)]
    names = np.sort(ids)
    columns = []
    for i, x in enumerate(feats):
        at = rng.permutation(n)
        out |= {f"ids_in{i}": ids[at], f"feats_in{i}": f32(x[at])}
        columns.append(unit(f32(x[np.argsort(ids)]).astype(np.float64)).astype(np.float64))

    def join(w):
        return np.concatenate([c * v for c, v in zip(columns, w)], 1)

    return out | dict(
        ids_out=names,
        feats_out=unit(join(out["weights"])),
        feats_out_raw=f32(join(out["weights"])),
        feats_out_w1=unit(join([1, 1, 1])),
        feats_out_single=f32(columns[0]),
    )


def make(folder, seed=7):
    "Write all files."
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, f in enumerate(
        (
            losses,
            pooling,
            whiten,
            metrics,
            qe_dba,
            egt,
            diffusion,
            rerank,
            recognition,
            ransac,
            cleaning,
            batching,
            extract,
        )
    ):
        np.savez(Path(folder) / f"{f.__name__}.npz", **f(np.random.default_rng([seed, i])))


if __name__ == "__main__":
    make(sys.argv[1])
