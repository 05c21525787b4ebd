#!/usr/bin/env bash
# Remove everything that deploy/README.md made: the bucket with photos and results, the AMIs, the stack.
#
#   deploy/remove.sh STACK [AWS CLI options, such as --region eu-west-1 --profile me]
#
# It asks first. Rented machines are not its business: `python -m fruits_dask cluster down --all`.
# Needs the AWS CLI, version 2.
set -euo pipefail

if (($# < 1)) || [[ $1 == -* ]]; then
  echo "usage: ${0##*/} STACK [AWS CLI options]" >&2
  exit 2
fi
stack=$1
shift
parameter=/fruits-dask/ami

rented=$(aws ec2 describe-instances \
  --filters Name=tag-key,Values=fruits-dask:cluster \
    Name=instance-state-name,Values=pending,running,stopping,stopped \
  --query 'Reservations[].Instances[].InstanceId' --output text "$@")
if [[ -n $rented ]]; then
  echo "still rented: $rented; first run \`python -m fruits_dask cluster down --all\`" >&2
  exit 1
fi

bucket=$(aws cloudformation describe-stacks --stack-name "$stack" \
  --query "Stacks[0].Outputs[?OutputKey=='Bucket'].OutputValue" --output text "$@")
if [[ -z $bucket || $bucket == None ]]; then
  echo "the stack $stack has no output Bucket; is it of deploy/stack.yaml?" >&2
  exit 1
fi
images=$(aws ec2 describe-images --owners self --filters Name=tag-key,Values=fruits-dask:image \
  --query 'Images[].ImageId' --output text "$@")
snapshots=$(aws ec2 describe-snapshots --owner-ids self --filters Name=tag-key,Values=fruits-dask:image \
  --query 'Snapshots[].SnapshotId' --output text "$@")

echo "This removes, for good:" >&2
echo "  all photos and results in s3://$bucket" >&2
echo "  AMIs: ${images:-none}; their snapshots: ${snapshots:-none}" >&2
echo "  the SSM parameter $parameter, and the stack $stack with its image repository" >&2
read -r -p "Type the name of the bucket to go on: " answer
if [[ $answer != "$bucket" ]]; then
  echo "nothing was removed" >&2
  exit 1
fi

aws s3 rm "s3://$bucket" --recursive --only-show-errors "$@"
for image in $images; do
  aws ec2 deregister-image --image-id "$image" "$@" >/dev/null
done
for snapshot in $snapshots; do
  aws ec2 delete-snapshot --snapshot-id "$snapshot" "$@"
done
# One call that does not fail when there is none.
aws ssm delete-parameters --names "$parameter" "$@" >/dev/null
aws cloudformation delete-stack --stack-name "$stack" "$@"
aws cloudformation wait stack-delete-complete --stack-name "$stack" "$@"
echo "$stack is gone" >&2
