package cloudbridge

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// sealTo is a node's key, as it reported it. The zero value is none yet.
type sealTo struct {
	public, id string
}

// secret brings the topics of a Secret up to date, one per node that needs it,
// each sealed to that node's key. What the broker holds is used again as long as
// Secret and key are the same: sealed anew, it would cross the link for nothing.
func (d *desired) secret(ctx context.Context, name string) error {
	owner := key{kindSecret, name}
	nodes := d.refs.nodes(owner)
	m, ok := get[metav1.PartialObjectMetadata](d.in.secrets, name)
	ns, short, err := cache.SplitMetaNamespaceKey(name)
	if len(nodes) == 0 || !ok || err != nil {
		d.set(owner, nil)
		return nil //nolint:nilerr // no Secret can be called so
	}
	want := map[topic.Topic][]byte{}
	keys := map[topic.Topic]sealTo{} // what has to be sealed
	for n := range nodes {
		tp, to := topic.DesiredSecret(n, ns, short), d.sealKey(n)
		prev, held := d.truth.before(tp)
		var s payload.Sealed
		if held = held && payload.Decode(prev, &s) == nil; held {
			want[tp] = prev // until there is better
		}
		same := held && s.UID == string(m.UID) && s.Rev == rev(m.ResourceVersion) && s.Key == to.id
		if to.id != "" && !same {
			keys[tp] = to
		}
	}
	if len(keys) == 0 {
		d.set(owner, want)
		return nil
	}
	obj, err := d.kube.CoreV1().Secrets(ns).Get(ctx, short, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		d.set(owner, nil)
		return nil
	case err != nil:
		d.set(owner, want)
		return fmt.Errorf("get secret %s: %w", name, err)
	}
	plain := payload.Encode(payload.SecretData{Type: string(obj.Type), Data: obj.Data})
	for tp, to := range keys {
		s, err := seal.Seal(to.public, tp, string(obj.UID), rev(obj.ResourceVersion), plain)
		if err != nil {
			return err // the mirror has checked the key
		}
		want[tp] = payload.Encode(s)
	}
	d.set(owner, want)
	return nil
}

// rekeyed looks again at what is sealed to a node's key.
func (d *desired) rekeyed(node string) {
	for _, pod := range indexed(d.in.pods, byNode, node) {
		for o := range d.refs.of(pod) {
			if o.kind == kindSecret {
				d.pods.Add(o)
			}
		}
		d.pods.Add(key{kindToken, pod})
	}
}
