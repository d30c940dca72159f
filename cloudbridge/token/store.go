package token

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// DefaultNamespace is where the Secrets are.
	DefaultNamespace = "fairlead-system"
	// SecretType is the type of a token's Secret.
	SecretType corev1.SecretType = "fairlead.dev/node-token" //nolint:gosec // G101: a type's name, no credential
	// NodeLabel is the label that names the node.
	NodeLabel = "fairlead.dev/node"

	namePrefix = "fairlead-node-"
	hashKey    = "sha256"
	// maxLabel is Kubernetes' bound on a label's value, and so on a node that
	// is to have kubernetes.io/hostname.
	maxLabel = 63
)

// ErrExists says that the node has a token already.
var ErrExists = errors.New("the node has a token already; a new one locks out whoever uses the old one, so it has to be forced")

// ErrNone says that the node has no token.
var ErrNone = errors.New("the node has no token")

// Store keeps the tokens' hashes in Kubernetes.
type Store struct {
	Kube kubernetes.Interface
	// Namespace is [DefaultNamespace] where it is empty.
	Namespace string
}

// Entry is one node's token, without its secret.
type Entry struct {
	Node    string
	Created time.Time // of the Secret; Rotate keeps it
	Rotated time.Time // zero where it never was
}

const rotatedAnnotation = "fairlead.dev/rotated"

func (s Store) namespace() string {
	if s.Namespace == "" {
		return DefaultNamespace
	}
	return s.Namespace
}

// CheckNode refuses names that no node can have.
func CheckNode(node string) error {
	if err := topic.CheckName("node", node); err != nil {
		return err
	}
	if len(node) > maxLabel {
		return fmt.Errorf("node %q: %d characters are more than the %d that fit a Kubernetes label", node, len(node), maxLabel)
	}
	return nil
}

// Create makes the node's first token and gives it: URL-safe text of 43
// characters. [ErrExists] if there is one.
func (s Store) Create(ctx context.Context, node string) (string, error) {
	text, secret, err := s.fresh(node)
	if err != nil {
		return "", err
	}
	secrets := s.Kube.CoreV1().Secrets(s.namespace())
	_, err = secrets.Create(ctx, secret, metav1.CreateOptions{})
	if apierrors.IsNotFound(err) { // the namespace
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.namespace()}}
		if _, err := s.Kube.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			return "", fmt.Errorf("create namespace %s: %w", s.namespace(), err)
		}
		_, err = secrets.Create(ctx, secret, metav1.CreateOptions{})
	}
	switch {
	case apierrors.IsAlreadyExists(err):
		return "", fmt.Errorf("token of node %s: %w", node, ErrExists)
	case err != nil:
		return "", fmt.Errorf("create token of node %s: %w", node, err)
	}
	return text, nil
}

// Rotate gives the node a new token, whether it had one or not. The old one
// stops working at the node's next connect.
func (s Store) Rotate(ctx context.Context, node string) (string, error) {
	text, err := s.Create(ctx, node)
	if !errors.Is(err, ErrExists) {
		return text, err
	}
	text, secret, err := s.fresh(node)
	if err != nil {
		return "", err
	}
	secret.Annotations = map[string]string{rotatedAnnotation: time.Now().UTC().Format(time.RFC3339)}
	if _, err := s.Kube.CoreV1().Secrets(s.namespace()).Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
		return "", fmt.Errorf("rotate token of node %s: %w", node, err)
	}
	return text, nil
}

// Revoke removes the node's token: its next connect is refused. [ErrNone] if
// there is none.
func (s Store) Revoke(ctx context.Context, node string) error {
	if err := CheckNode(node); err != nil {
		return err
	}
	err := s.Kube.CoreV1().Secrets(s.namespace()).Delete(ctx, namePrefix+node, metav1.DeleteOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("token of node %s: %w", node, ErrNone)
	case err != nil:
		return fmt.Errorf("revoke token of node %s: %w", node, err)
	}
	return nil
}

// List gives the nodes that have a token, by name.
func (s Store) List(ctx context.Context) ([]Entry, error) {
	list, err := s.Kube.CoreV1().Secrets(s.namespace()).List(ctx, metav1.ListOptions{LabelSelector: NodeLabel})
	if err != nil {
		return nil, fmt.Errorf("list tokens in namespace %s: %w", s.namespace(), err)
	}
	var out []Entry
	for i := range list.Items {
		sec := &list.Items[i]
		node, _, err := read(sec)
		if err != nil {
			continue // no token of ours, whatever its label says
		}
		rotated, _ := time.Parse(time.RFC3339, sec.Annotations[rotatedAnnotation])
		out = append(out, Entry{Node: node, Created: sec.CreationTimestamp.Time, Rotated: rotated})
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(a.Node, b.Node) })
	return out, nil
}

// fresh makes a token and the Secret that remembers it.
func (s Store) fresh(node string) (string, *corev1.Secret, error) {
	if err := CheckNode(node); err != nil {
		return "", nil, err
	}
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	text := base64.RawURLEncoding.EncodeToString(b[:])
	sum := sha256.Sum256([]byte(text))
	return text, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Name: namePrefix + node, Namespace: s.namespace(),
			Labels: map[string]string{NodeLabel: node, "app.kubernetes.io/part-of": "fairlead"},
		},
		Type: SecretType,
		Data: map[string][]byte{hashKey: []byte(hex.EncodeToString(sum[:]))},
	}, nil
}

// read takes a token's Secret apart.
func read(s *corev1.Secret) (node string, hash [sha256.Size]byte, err error) {
	node = s.Labels[NodeLabel]
	if s.Type != SecretType || s.Name != namePrefix+node {
		return "", hash, fmt.Errorf("secret %s/%s: want type %s and name %s<node>", s.Namespace, s.Name, SecretType, namePrefix)
	}
	raw := s.Data[hashKey]
	if len(raw) != 2*sha256.Size {
		return "", hash, fmt.Errorf("secret %s/%s: want %d hexadecimal digits under %s", s.Namespace, s.Name, 2*sha256.Size, hashKey)
	}
	if _, err := hex.Decode(hash[:], raw); err != nil {
		return "", hash, fmt.Errorf("secret %s/%s: %s: %w", s.Namespace, s.Name, hashKey, err)
	}
	return node, hash, nil
}
