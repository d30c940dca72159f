// Package crdtest holds the CustomResourceDefinitions of schemas/crd and the
// admission policies of deploy/cloud/policies.yaml against a real kube-apiserver.
//
// Each file in testdata/cases is one case. Its first line is
//
//	# accept
//	# reject: <part of the message>
//
// Its last document is the subject: it is applied as a dry run. The documents
// before it, the models it needs, are applied for real, in a namespace of the
// case's own. A report becomes a test by copying what was applied into a file.
//
// The API server is tools/devcluster: bin/devcluster, or what the environment
// variable FAIRLEAD_DEVCLUSTER names.
package crdtest
